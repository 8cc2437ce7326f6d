"""Paths of another kind, and paths that this user may not use, are one error of the command."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from gptoughts.cli.ending import one_message
from gptoughts.errors import ConfigError, RunError
from gptoughts.files import PATH_ERRORS, write_json
from gptoughts.inference.generate.offloaded import _prepare
from gptoughts.planning.environment import Process
from gptoughts.run.storage import storage_errors
from gptoughts.run.tracking.lines import LineFile


def test_a_folder_in_the_place_of_a_runs_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    place = tmp_path / "metrics.jsonl"
    place.mkdir()
    with pytest.raises(RunError, match=r"metrics\.jsonl: Is a directory\.\n  Try: remove or rename it"), storage_errors():
        LineFile(place)
    with pytest.raises(RunError, match=r"metrics\.jsonl: Is a directory\.\n"), storage_errors():
        write_json(place, {})


@pytest.mark.parametrize("number", PATH_ERRORS)
def test_the_command_ends_with_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, one_message(Process.CALLERS):
        raise OSError(number, os.strerror(number), "there")
    assert ended.value.code == 2 and capsys.readouterr().err == f"error: there: {os.strerror(number)}\n"


def test_an_error_without_a_path_keeps_its_traceback() -> None:
    with pytest.raises(PermissionError), one_message(Process.CALLERS):
        raise OSError(errno.EPERM, "")


def test_offload_names_the_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(ConfigError, match=r"--offload .*file.*: cannot be written"):
            _prepare(folder)
    _prepare(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
