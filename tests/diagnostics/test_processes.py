"""Child processes: messages, deaths, and what is left after a parent that was killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import pytest

from gptoughts.processes import Child, ChildDied, exit_text, last_lines, receive, send
from tests.support.golden_files import ROOT

HERE = "tests.diagnostics.test_processes"


def doubles(requests: IO[bytes], answers: IO[bytes], word: str) -> None:
    """Answer each body twice over, with its own word; print in between. Die at the message "die"."""
    while True:
        try:
            message, body = receive(requests)
        except EOFError:
            return
        print(f"working on {message}", flush=True)
        if message == "die":
            os.kill(os.getpid(), 9)
        send(answers, {"word": word, "message": message, "folder": os.getcwd() in sys.path}, body + body)


def starts_another(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Start a process that sleeps, tell its id, then never look at requests again."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    send(answers, child.pid)
    time.sleep(100)


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.is_file() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_messages_with_bodies() -> None:
    with Child(HERE, "doubles", "w\u00f6rd") as child:
        for message, body in (("one", b""), ({"a": [1, None]}, b"x\n\0" * 100_000), ("line\nbreak", b"\n")):
            answer, double = child.ask(message, body)
            assert answer["word"] == "w\u00f6rd" and answer["message"] == message and double == body + body
    assert child.process.returncode == 0 and child.output() == "break"


def test_a_death_names_signal_and_last_line() -> None:
    child = Child(HERE, "doubles", "x")
    with pytest.raises(ChildDied, match=r"^killed by SIGKILL: working on die$") as died:
        child.ask("die")
    assert died.value.code == -9
    child.close()
    missing = Child(HERE, "no_such_function")
    with pytest.raises(ChildDied, match=r"^exit code 1: .*no_such_function"):
        missing.ask("x")
    missing.close()
    assert child.output() == "working on die", "also after it was closed"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_error_in_the_parent_kills_the_group() -> None:
    pid: Any = None
    with pytest.raises(ZeroDivisionError), Child(HERE, "starts_another") as child:
        pid, _ = child.ask("go")
        assert alive(pid)
        raise ZeroDivisionError
    assert not alive(child.process.pid)
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_ends_with_its_parent() -> None:
    program = (
        "import os; from gptoughts.processes import Child; "
        f"child = Child({HERE!r}, 'doubles', 'x'); child.ask('a'); print(child.process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -9
    deadline = time.monotonic() + 10
    while alive(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(int(done.stdout))


def test_wait_has_a_deadline_and_close_a_grace() -> None:
    child = Child(HERE, "starts_another")
    calls: list[int] = []
    assert child.wait(0.2, lambda: calls.append(1)) is None and len(calls) > 1
    child.close(0.1)
    assert child.process.returncode == -9


def test_words() -> None:
    assert exit_text(3) == "exit code 3" and exit_text(-11) == "killed by SIGSEGV" and exit_text(-40) == "killed by signal 40"
    assert last_lines("a\n\n b \nc\n", 2) == "b / c" and last_lines("") == ""
