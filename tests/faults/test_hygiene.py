"""Ten thousand toy steps hold no more at their end than at their beginning; what grows is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import gptoughts
from tests.faults.hygiene import COUNTS, STEPS, growth, too_much, train

ROOT = Path(__file__).parents[2]


def test_growth_is_what_the_second_half_holds_more() -> None:
    flat = {"resident_bytes": 100, **dict.fromkeys(COUNTS, 3)}
    rows = [{**flat, "step": step} for step in range(100)]
    for row in rows[:15]:
        row["threads"] = 50  # the start is left out
    assert set(growth(rows).values()) == {0} and too_much(growth(rows)) == []
    rows[-1]["threads"] = 51
    rows[80]["resident_bytes"] += 5 << 20
    assert too_much(growth(rows)) == ["threads grows by 48", "resident memory grows by 5242880 bytes"]


@pytest.mark.long
def test_nothing_grows_over_ten_thousand_steps(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.faults.hygiene", "--steps", str(STEPS), "--to", str(tmp_path / "record.json")]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=1200)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert record["steps"] == STEPS and record["wrong"] == [] and len(record["rows"]) >= 20


class Leak(gptoughts.Callback):
    """Keeps memory, file handles, threads and temporary files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept, self.end = folder, list[Any](), threading.Event()

    def on_step(self, engine: Any, progress: Any, stats: Any, last: bool) -> None:
        self.kept.append(bytearray(1 << 16))
        if progress.step % 100 == 0:
            self.kept.append(open(self.folder / f"leak-{progress.step}", "wb"))  # noqa: SIM115
            (self.folder / "tmp" / f"leak-{progress.step}").touch()
            threading.Thread(target=self.end.wait, daemon=True).start()


@pytest.mark.long
def test_a_callback_that_leaks_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    leak = Leak(tmp_path)
    try:
        wrong = too_much(growth(train(tmp_path, 1000, [leak])))
    finally:
        leak.end.set()
        for one in leak.kept:
            if not isinstance(one, bytearray):
                one.close()
    assert {line.split()[0] for line in wrong} == {"file_handles", "threads", "temporary_files", "resident"}
