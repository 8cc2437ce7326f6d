"""Rows of a run are appended whatever the disk does, and read whatever is in the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoughts.run.tracking import lines
from gptoughts.run.tracking.jsonl import attempts, read
from gptoughts.run.tracking.lines import LineFile, read_lines


def row(step: int, **more: Any) -> str:
    return json.dumps({"step": step, "attempt": 1, **more})


def test_rows_that_the_disk_does_not_take_come_later_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write, fails = tmp_path / "m.jsonl", os.write, [False]

    def failing(file: int, data: bytes) -> int:
        if fails[0]:
            raise OSError(28, "No space left on device")
        return write(file, data[:7])  # and short writes

    monkeypatch.setattr(os, "write", failing)
    file = LineFile(path)
    for step in range(6):
        fails[0] = step in (1, 2, 4)
        file.write(row(step))
    file.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(6))


def test_what_is_kept_has_a_limit_and_drops_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "m.jsonl", os.write

    def full(file: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lines, "MOST_PENDING", 200)
    monkeypatch.setattr(os, "write", full)
    file = LineFile(path)
    for step in range(50):
        file.write(row(step))
    monkeypatch.setattr(os, "write", write)
    file.write(row(50))
    file.close()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == list(range(steps[0], 51)) and 3 < len(steps) < 12


def test_a_line_that_a_kill_cut_off_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(row(1) + "\n" + row(2)[:9], encoding="utf-8")
    file = LineFile(path)
    file.write(row(2))
    file.close()
    assert [found["step"] for found in read_lines(path, ("step",))[0]] == [1, 2]


def test_damaged_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    bad = [b"\xff" + row(1).encode(), b"5", b"null", b"[]", b'{"step": 2}', b'{"step": "3", "attempt": 1}', b"[" * 100_000]
    path.write_bytes(b"\n".join([row(1).encode(), *bad, row(4, **{"eval/val_loss": 2.0}).encode(), row(5).encode()[:5]]))
    assert [one["step"] for one in read(path)] == [1, 4]
    assert read(path)[1]["eval/loss"] == 2.0
    assert attempts(path) == 1
    assert read_lines(path, ("step", "attempt"))[1] == len(bad) + 1
    assert attempts(tmp_path / "absent") == 0


@given(st.binary(max_size=200))
def test_any_bytes_are_read(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("lines") / "m.jsonl"
    path.write_bytes(row(1).encode() + b"\n" + content.replace(b"\n", b" "))
    assert read(path)[0]["step"] == 1
