"""SIGTERM before the first step ends `gptoughts train` with one line and code 143."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gptoughts.cli import ending

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", ending.ENDING)
def test_the_handler_exits_with_one_line_and_a_second_signal_exits_at_once(
    capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    before = {other: signal.signal(other, ending._end) for other in ending.ENDING}
    try:
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), number)
        assert (
            ended.value.code == 128 + number and capfd.readouterr().err == f"ended by {number.name}; saved checkpoints stay\n"
        )
        assert {signal.getsignal(other) for other in ending.ENDING} == {ending._end_at_once}
    finally:
        for other, handler in before.items():
            signal.signal(other, handler)


def test_inside_another_program_the_handler_stays() -> None:
    before = signal.getsignal(signal.SIGTERM)
    ending.end_at_signals()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_sigterm_after_the_plan(tmp_path: Path) -> None:
    """The plan is printed before torch is loaded, text tokenized and the model built."""
    words = ["train", "quickstart", "--data.cache", str(tmp_path / "cache"), "--run-dir", str(tmp_path / "run")]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "gptoughts", *words]
    with subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 143 and said.strip() == "ended by SIGTERM; saved checkpoints stay"
    assert not (tmp_path / "run").exists()
