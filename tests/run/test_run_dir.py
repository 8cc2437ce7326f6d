"""Two runs never share a folder: the lock is where the checkpoints are, and ends with its process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptoughts.errors import RunError
from gptoughts.run.tracking.run_dir import RunFolder, run_folder

HOLD = """
import sys
from gptoughts.run.tracking.run_dir import run_folder
folder = run_folder("r", sys.argv[1])
folder.lock()
print("locked", flush=True)
sys.stdin.read()
"""


def folder(place: Path) -> RunFolder:
    return run_folder("r", str(place))


def test_a_lock_survives_the_loss_of_every_file_and_a_dead_owners_is_taken_over(tmp_path: Path) -> None:
    place = tmp_path / "r"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(place)], stdin=-1, stdout=-1, text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "locked\n"
        for file in (place / ".lock", place / "checkpoints" / ".lock"):
            file.unlink(missing_ok=True)
        with pytest.raises(RunError, match=r"run folder is in use\. Found process unknown"):
            folder(place).lock()
        (place / "checkpoints" / ".lock").write_text(f"{owner.pid} on here", encoding="utf-8")
        with pytest.raises(RunError, match=rf"run folder is in use\. Found process {owner.pid} on here"):
            folder(place).lock()
        owner.kill()
    taken = folder(place)
    with taken.locked():
        assert (place / "checkpoints" / ".lock").read_text().startswith(f"{os.getpid()} on ")


def test_the_lock_lies_with_the_checkpoints(tmp_path: Path) -> None:
    """Another folder of results does not let a second run at the same checkpoints."""
    first = RunFolder("r", tmp_path / "one", tmp_path / "checkpoints")
    with first.locked(), pytest.raises(RunError, match="in use"):
        RunFolder("r", tmp_path / "two", tmp_path / "checkpoints").lock()


def test_runs_without_a_name_that_start_in_one_second_have_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with run_folder("same", None, fresh=True).locked():
        second = run_folder("same", None, fresh=True)
        with second.locked():
            assert (second.name, second.out, second.checkpoints) == ("same-2", Path("out/same-2"), Path("checkpoints/same-2"))
    assert not list(tmp_path.glob("*/same*")), "nothing was written, so nothing stays"


def test_other_ranks_take_the_folder_of_the_first(tmp_path: Path) -> None:
    one, other = run_folder("r-1", None, fresh=True), run_folder("r-2", None, fresh=True)
    other.agree(lambda mine: ["r-1\nout/r-1\ncheckpoints/r-1", mine])
    assert (other.name, other.out, other.checkpoints) == (one.name, one.out, one.checkpoints)
    named = run_folder("mine", None)
    named.agree(lambda mine: ["r-1\nout/r-1\ncheckpoints/r-1", mine])
    assert named.name == "mine"


def test_folders_that_cannot_be_made_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match=r"file.*: cannot be written \((Not a directory|File exists)\)\.\n  Try: --run-dir"):
        folder(tmp_path / "file" / "r").lock()
