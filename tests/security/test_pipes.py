"""A pipe in the place of a file is an error or a missing file, and nothing waits for its writer."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from gptoughts.data import table
from gptoughts.data.text import shards
from gptoughts.diagnostics.report import rows, run_data
from gptoughts.errors import ConfigError, DataError
from gptoughts.hardware import machine
from gptoughts.inference.export import passage_of
from gptoughts.run.tracking import lines, run_dir


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """End a test that waits for a pipe."""

    def stop(*_: object) -> None:
        raise TimeoutError("waits for a pipe")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    path = tmp_path / "run_id"
    os.mkfifo(path)
    return path


READERS: dict[str, tuple[Callable[[Path], object], type[Exception]]] = {
    "shard": (lambda path: shards.open_array(path, 4, np.dtype(np.int64)), DataError),
    "hash of a shard": (lambda path: shards.check_content(path, "0" * 64), DataError),
    "machine": (machine.read, ConfigError),
    "text of an export": (lambda path: passage_of(str(path)), ConfigError),
    "rows of a run": (lambda path: lines.read_lines(path, ("step",)), OSError),
    "rows to append to": (lines.LineFile, OSError),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_pipe_is_refused_wherever_a_file_is_read(kind: str, pipe: Path) -> None:
    read, error = READERS[kind]
    with pytest.raises(error, match=r"run_id") as told:
        read(pipe)
    assert not isinstance(told.value, TimeoutError)


def test_a_device_without_an_end_is_refused() -> None:
    for read in (machine.read, lambda path: passage_of(str(path))):
        with pytest.raises(ConfigError, match=r"/dev/zero.*not a regular file"):
            read(Path("/dev/zero"))


def test_an_array_of_a_table_is_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"a.npy: missing, or not a file"):
        table.open_array(tmp_path, "a", {"bytes": 0, "sha256": "", "dtype": "int64", "shape": [1]}, 1)


def test_a_report_reads_no_pipe(pipe: Path) -> None:
    assert list(rows.lines(pipe, Counter())) == [] and run_data._text(pipe) is None


def test_the_name_at_trackers_is_not_read_from_a_pipe(pipe: Path) -> None:
    folder = run_dir.run_folder("x", str(pipe.parent))
    assert folder.out == pipe.parent
    assert run_dir.run_id(folder, None, None).isalnum()
    assert pipe.is_file(), "replaced by a file"


def test_control_an_open_pipe_waits(pipe: Path) -> None:
    signal.alarm(1)
    with pytest.raises(TimeoutError, match="waits for a pipe"):
        pipe.open("rb")
