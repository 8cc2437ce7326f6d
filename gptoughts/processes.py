"""Child processes: start a function of ours in a fresh Python, exchange messages over pipes, end it with everything it started.

A child leads its own process group. Its requests come from standard input, which ends when the parent closes it or dies: children
exit then, so none is orphaned. No child looks for modules in the current folder, where a numpy.py that lies beside data would run.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Self

ROOT = str(Path(__file__).resolve().parents[1])
"""The folder that holds the package."""
POLL_SECONDS = 0.02
GRACE_SECONDS = 20.0
SIGNAL_SECONDS = 8.0
"""Longest time between a signal and the end of a process that has nothing to save."""
TAIL_BYTES = 20_000
SAFE_PATH = "PYTHONSAFEPATH"
"""Environment variable: Python processes do not put the current folder on sys.path; inherited by all that a child starts."""
PROGRAM = "import json, sys; sys.path[:0] = json.loads(sys.argv[1])[0]; from gptoughts.processes import run_child; run_child()"


def process_began() -> float:
    """Return the unix time at which this process started, to 10 ms on Linux; elsewhere the present time."""
    try:
        # Field 22 counts clock ticks since boot; the name in field 2 may hold spaces.
        ticks = int(Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        return time.time() - max(0.0, up - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return time.time()


class ChildDied(Exception):
    """A child exited instead of answering. `code` is its exit code, negative for a signal."""

    def __init__(self, code: int, output: str) -> None:
        super().__init__(f"{exit_text(code)}: {output}" if output else exit_text(code))
        self.code = code


class Child:
    """A Python process that calls `module.function(requests, answers, *arguments)`: pipes for `receive` and `send`, then JSON values.

    `paths` come first on its sys.path (default: the parent's sys.path without the current folder of `-c` and interactive Python).
    Its output goes to a temporary file, for error messages. As a context manager: closed, after an exception killed.
    """

    def __init__(
        self, module: str, function: str, *arguments: Any,
        environment: Mapping[str, str] | None = None, paths: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        found = [*filter(None, sys.path), ROOT] if paths is None else list(paths)
        self._log, self._tail = tempfile.TemporaryFile(), b""  # noqa: SIM115 - closed by close()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM, json.dumps([found, module, function, arguments])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, start_new_session=True,
            env={**(os.environ if environment is None else environment), SAFE_PATH: "1"},
        )  # fmt: skip

    def ask(self, message: Any, body: Any = b"") -> tuple[Any, bytes]:
        """Send a request and return the answer. Raises ChildDied."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it exited: an answer may still be in the pipe
                send(self.process.stdin, message, body)
            return receive(self.process.stdout)
        except EOFError:
            raise ChildDied(self.process.wait(), self.output(3)) from None

    def wait(self, seconds: float, meanwhile: Callable[[], None] | None = None) -> int | None:
        """Return the exit code, None if the child still runs after `seconds`. `meanwhile` is called every 20 ms."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            if meanwhile is not None:
                meanwhile()
            time.sleep(POLL_SECONDS)
        return self.process.returncode

    def output(self, lines: int = 1) -> str:
        """Return the last non-empty lines that the child printed, joined by ` / `."""
        if not self._log.closed:  # read without a seek, which would move the child's position, too
            self._tail = os.pread(self._log.fileno(), TAIL_BYTES, max(0, os.fstat(self._log.fileno()).st_size - TAIL_BYTES))
        return last_lines(self._tail.decode("utf-8", "replace"), lines)

    def close(self, grace: float = GRACE_SECONDS) -> None:
        """Close the child's input, so that it exits by itself; after `grace` seconds kill it and every process it started."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if grace == 0 and self.process.poll() is None:
            kill_group(self.process.pid)
        with suppress(BrokenPipeError):  # unsent bytes of an exited child
            self.process.stdin.close()
        try:
            self.process.wait(grace or None)
        except subprocess.TimeoutExpired:
            kill_group(self.process.pid)
            self.process.wait()
        self.process.stdout.close()
        self.output()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(GRACE_SECONDS if kind is None else 0)


class LimitExceeded(Exception):
    """A limited child exceeded a limit and was ended: `takes too long`, `takes too much memory`, or the child's own word."""


class LimitedChild:
    """A child that answers requests from files of others, each within limits on CPU time and memory.

    `module.function()` returns, in the child, a function from request to answer (a table); an answer with the key `limit` ends the
    child. It starts with the first request, and again after one that exceeded a limit. Safe to use from several threads.
    """

    def __init__(self, module: str, function: str, seconds: float, memory_bytes: int) -> None:
        self._arguments = (module, function, seconds, memory_bytes)
        self._child: Child | None = None
        self.lock = threading.RLock()
        atexit.register(self.close)

    @property
    def is_running(self) -> bool:
        """Whether the child of the previous request still serves."""
        return self._child is not None

    def ask(self, request: Any) -> dict[str, Any]:
        """Return the answer to a request. Raises LimitExceeded."""
        with self.lock:
            if self._child is None:
                self._child = Child(__name__, "serve_limited", *self._arguments)
            try:
                answer: dict[str, Any] = self._child.ask(request)[0]
            except ChildDied as error:
                self.close()
                reason = "takes too long" if error.code == -signal.SIGPROF else f"ended its process ({error})"
                raise LimitExceeded(reason) from None
            if "limit" in answer:
                self.close()
                raise LimitExceeded(answer["limit"])
            return answer

    def close(self) -> None:
        """End the child; the next request starts another."""
        if self._child is not None:
            self._child.close(1)
        self._child = None


def serve_limited(
    requests: IO[bytes], answers: IO[bytes], module: str, function: str, seconds: float, memory_bytes: int
) -> None:
    """Answer requests of a LimitedChild until the parent closes the pipe or dies."""
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer_to = getattr(import_module(module), function)()
    while True:
        try:
            request, _ = receive(requests)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its default action ends the process, also inside C code
        try:
            answer = answer_to(request)
        except MemoryError:
            answer = {"limit": "takes too much memory"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            send(answers, answer)
        except BrokenPipeError:
            return
        if "limit" in answer:
            return


class SignalClock:
    """Ends the process if it does not act on a signal: the main thread runs Python's handlers only between two calls into native code.

    `excused` tells whether the process acts on signals by itself, as a training does after its first step.
    """

    def __init__(self) -> None:
        self.excused: Callable[[], bool] = lambda: False
        self.heard: int | None = None
        """The last signal that came. What a handler raises is lost if a module that is being imported catches everything."""
        self._reading: int | None = None

    def start(self, numbers: Sequence[int]) -> None:
        """Watch for signals `numbers` from now on. Call it in the main thread, once."""
        if self._reading is not None:
            return
        self._reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # or a fork's signals would count as ours
        threading.Thread(target=self._watch, args=(frozenset(numbers),), name="signal-clock", daemon=True).start()

    def _watch(self, numbers: frozenset[int]) -> None:
        assert self._reading is not None
        # Signals that the main thread holds back stay pending only if no other thread takes them.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            found = [number for number in os.read(self._reading, 64) if number in numbers]
            if found:
                self.heard = found[-1]
                time.sleep(SIGNAL_SECONDS)
                if not self.excused():
                    with suppress(OSError):
                        os.write(2, f"ended by {signal.Signals(found[0]).name}; saved checkpoints stay\n".encode())
                    os._exit(128 + found[0])


CLOCK = SignalClock()


def module_words(module: str) -> list[str]:
    """Return the words that run `python -m MODULE` of ours, without modules of the current folder unless that is our checkout."""
    return [sys.executable, *([] if in_checkout() else ["-P"]), "-m", module]


def in_checkout() -> bool:
    """Return whether the current folder holds the package, so that `-m` may have to look there."""
    return os.path.realpath(os.curdir) == os.path.realpath(ROOT)


def shelter_children() -> None:
    """Let no Python process that this one starts, such as torch's compile workers, import modules of the current folder."""
    if not in_checkout():
        os.environ.setdefault(SAFE_PATH, "1")


def run_child() -> None:
    """Entry point of a child. Standard output is redirected to standard error: print() must not write between two answers."""
    _, module, function, arguments = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    getattr(import_module(module), function)(sys.stdin.buffer, answers, *arguments)


def send(pipe: IO[bytes], message: Any, body: Any = b"") -> None:
    """Write one message: a line of JSON with the message and the size of its body, then the bytes of the body."""
    view = memoryview(body).cast("B") if len(body) else b""
    pipe.write(json.dumps([message, len(view)]).encode() + b"\n")
    pipe.write(view)
    pipe.flush()


def receive(pipe: IO[bytes]) -> tuple[Any, bytes]:
    """Read the next message and its body. Raises EOFError at the end of the pipe."""
    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    message, size = json.loads(line)
    body = pipe.read(size)
    if len(body) < size:
        raise EOFError
    return message, body


def kill_group(pid: int) -> None:
    """Kill the process group that `pid` leads, or `pid` alone if it leads none yet."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_tree(pid: int) -> None:
    """Kill a process and all that it started, also those in process groups of their own, which it is stopped for first."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
    for child in _children(pid):
        kill_tree(child)
    kill_group(pid)


def _children(pid: int) -> list[int]:
    """Return the processes that `pid` started; none where there is no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            if int(path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def exit_text(code: int) -> str:
    """Return `exit code 1` or `killed by SIGSEGV`."""
    if code >= 0:
        return f"exit code {code}"
    known = {number.value for number in signal.Signals}
    return f"killed by {signal.Signals(-code).name if -code in known else f'signal {-code}'}"


def last_lines(text: str, lines: int = 1) -> str:
    """Return the last non-empty lines joined by ` / `, each cut to 300 characters."""
    found = [line.strip()[:300] for line in text.splitlines() if line.strip()]
    return " / ".join(found[-lines:])
