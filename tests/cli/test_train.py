"""SIGTERM before the first step ends `gptoughts train`, and every other command, with one line and code 143."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from gptoughts.cli import ending
from gptoughts.cli.main import main

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


@pytest.mark.parametrize("line", [["recipes"], ["plan", "quickstart"], ["tokenize", "none.txt", "--to", "none"]])
def test_every_command_handles_signals_before_its_work(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Handled(Exception):
        pass

    def stop() -> None:
        raise Handled

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ending, "end_at_signals", stop)
    with pytest.raises(Handled):
        main(line)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_sigterm_to_verify_resume_ends_its_training_and_removes_its_folder(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be\n" * 4000, encoding="utf-8")
    words = ["verify-resume", "quickstart", "--data.path", "a.txt", "--data.cache", str(tmp_path / "cache")]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "gptoughts", *words]
    with subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=-1, stderr=-1, text=True) as process:
        while process.poll() is None and not list(tmp_path.glob("out/verify-resume-*/*.log")):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    assert (process.returncode, said.strip()) == (143, "ended by SIGTERM; saved checkpoints stay")
    assert not _processes_in(tmp_path) and not list(tmp_path.glob("out/*"))


def _processes_in(folder: Path) -> list[str]:
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            found += [(link.parent / "cmdline").read_text()] if link.readlink() == folder else []
    return found
