"""Processes that begin with torch imported are like others: words, folder, variables, streams, exit codes, signals, no torch of another."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import warm

TOLD = """
import os, sys
print(os.getcwd(), os.environ["MINE"], sys.argv[1:], sys.stdin.read())
print("aside", file=sys.stderr)
sys.exit(7)
"""


def test_words_folder_variables_streams_and_exit_code(tmp_path: Path) -> None:
    environment = {**os.environ, "MINE": "a b"}
    done = subprocess.run(
        [*warm.script(TOLD, environment), "one", "two words"], cwd=tmp_path, env=environment, input="given", capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (7, "aside\n")
    assert done.stdout == f"{tmp_path} a b ['one', 'two words'] given\n"


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("raise SystemExit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import atexit; atexit.register(print, 'at the end')", 0, ""),
    ],
)
def test_a_process_leaves_as_any_other(program: str, code: int, said: str) -> None:
    done = subprocess.run(warm.script(program), capture_output=True, text=True, check=False)
    assert done.returncode == code and said in done.stderr
    assert ("at the end" in done.stdout) == ("atexit" in program)


def test_processes_share_nothing_that_they_change() -> None:
    program = "import torch; print(torch.get_default_dtype()); torch.set_default_dtype(torch.float64)"
    told = [subprocess.run(warm.script(program), capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert told == ["torch.float32\n"] * 2


def test_what_is_started_ends_with_its_caller(tmp_path: Path) -> None:
    program = "import os, sys, time, pathlib; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)"
    place = tmp_path / "pid"
    with subprocess.Popen([*warm.script(program), str(place)]) as caller:
        until = time.monotonic() + 30
        while not (place.exists() and place.read_text()) and time.monotonic() < until:
            time.sleep(0.01)
        child = int(place.read_text())
        assert lives(child)
        caller.send_signal(signal.SIGKILL)
    until = time.monotonic() + 30
    while lives(child) and time.monotonic() < until:
        time.sleep(0.01)
    assert not lives(child)


def lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
