"""An empty entry of PYTHONPATH is the current folder: it is taken off before other modules are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.golden_files import ROOT

PLANTED = "raise SystemExit('planted code ran')\n"
ENTRY = ("-P", "-c", "from gptoughts.__main__ import start; start()")


def ours(place: Path, paths: str, start: tuple[str, ...], *words: str) -> subprocess.CompletedProcess[str]:
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"} | {"PYTHONPATH": paths}
    command = [sys.executable, *start, *words]
    return subprocess.run(command, check=False, cwd=place, env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("start", [("-m", "gptoughts"), ENTRY], ids=["python -m gptoughts", "gptoughts"])
@pytest.mark.parametrize("paths", [f":{ROOT}", f"{ROOT}:"])
def test_an_empty_entry_of_pythonpath_is_taken_off(tmp_path: Path, paths: str, start: tuple[str, ...]) -> None:
    (tmp_path / "click.py").write_text(PLANTED)
    done = ours(tmp_path, paths, start, "recipes")
    assert done.returncode == 0 and "quickstart" in done.stdout, done.stderr


def test_control_a_named_entry_stays(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text(PLANTED)
    assert "planted code ran" in ours(tmp_path, f"{tmp_path}::{ROOT}", ENTRY, "recipes").stderr


@pytest.mark.parametrize(("paths", "warns"), [(f":{ROOT}", True), (f"{ROOT}", False)])
def test_doctor_names_an_empty_entry(tmp_path: Path, paths: str, warns: bool) -> None:
    assert ("PYTHONPATH has an empty entry" in ours(tmp_path, paths, ENTRY, "doctor", "--quick").stdout) is warns
