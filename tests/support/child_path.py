"""A function for a child process that tells where it looks for modules."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def write(requests: object, answers: object, out: str) -> None:
    """Write the path and the variable of this process."""
    Path(out).write_text(json.dumps([sys.path, os.environ.get("PYTHONSAFEPATH")]), encoding="utf-8")
