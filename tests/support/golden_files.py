"""Text that is compared with a file of the repository: `UPDATE_GOLDEN=1 pytest` accepts what is printed now."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def compare(path: Path, text: str) -> None:
    """Fails with the difference and the command that accepts it."""
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    there = path.read_text(encoding="utf-8") if path.is_file() else ""
    if there == text:
        return
    lines = difflib.unified_diff(there.splitlines(), text.splitlines(), str(path.relative_to(ROOT)), "now", lineterm="", n=1)
    raise AssertionError("\n".join([*list(lines)[:60], "to accept: UPDATE_GOLDEN=1 pytest " + str(Path("tests"))]))
