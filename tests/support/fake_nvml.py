"""Compile the stand-in for libnvidia-ml.so.1 that tests/nvml describes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "nvml" / "fake_nvml.c"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
NEEDED = [
    pytest.mark.skipif(not COMPILER, reason="no C compiler for the fake NVML"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="NVML is probed on Linux only"),
]


def compile_library(folder: Path) -> Path:
    """Compile into `folder` and return it, for LD_LIBRARY_PATH."""
    command = [str(COMPILER), "-shared", "-fPIC", "-o", str(folder / "libnvidia-ml.so.1"), str(SOURCE)]
    subprocess.run(command, check=True, capture_output=True)
    return folder
