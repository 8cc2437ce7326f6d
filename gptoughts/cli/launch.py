"""Start the ranks of `gptoughts train` on this machine with torchrun's launcher, and start them again after out-of-memory."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from gptoughts.planning.environment import GUARD, SHORTAGE, preset_guard

AGAIN = 5
"""Restarts with a smaller micro-batch: from 32 sequences down to 1."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def launch(ranks: int, words: Sequence[str], environment: Mapping[str, str], resumes: bool) -> int:
    """Run `gptoughts WORDS` in `ranks` processes and return the exit code of the first one that failed, 0 without a failure.

    environment  variables of the plan, set where the user set none
    resumes      whether the run has a name, so that it continues after out-of-memory instead of starting over
    """
    with tempfile.TemporaryDirectory(prefix="gptoughts-") as folder:
        shortage = Path(folder) / "shortage"
        with _environment({**_missing(environment), SHORTAGE: str(shortage), "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT"}):
            for again in range(AGAIN, -1, -1):
                code = _run(ranks, words)
                if code == 0 or not shortage.exists() or not resumes or again == 0:
                    break
                shortage.unlink()
                print("out of memory; restarting with the smaller micro-batch", file=sys.stderr, flush=True)
    return code


def _missing(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the thread count of the plan, marked as ours, so that a rank that needs another one can still change it."""
    name = "OMP_NUM_THREADS"
    if name in os.environ or name not in environment:
        return {}
    return {name: environment[name], GUARD: preset_guard(name)}


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _run(ranks: int, words: Sequence[str]) -> int:
    """Start the ranks once. Returns their exit code."""
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # The ranks print their own errors; the launcher would add a table and a traceback of itself.
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    arguments = parse_args(["--standalone", "--nproc-per-node", str(ranks), "-m", "gptoughts"])
    arguments.training_script_args = list(words)  # past its parser, which takes abbreviations of its options for its own
    with _forwarding() as received:
        try:
            run(arguments)
        except ChildFailedError as error:
            failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
            return _exit_code([failure.exitcode for failure in failures])
        except SignalException as error:
            return 128 + int(error.sigval)
    return 128 + received[0] if received else 0


def _exit_code(codes: Sequence[int]) -> int:
    """Return the code of the first rank that exited by itself; else 128 + the signal that killed the first one.

    The launcher ends the other ranks with a signal once one has failed.
    """
    own = [code for code in codes if code > 0]
    return own[0] if own else 128 - codes[0]


@contextmanager
def _forwarding() -> Iterator[list[int]]:
    """Send signals on to the ranks, which save and exit; torchrun's own handler would kill them after 30 seconds.

    Yields the list of signals received.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # of another program, which handles signals itself
        yield received
        return

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for child in _children():
            os.kill(child, number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _children() -> list[int]:
    """Return the processes that this one started."""
    found: list[int] = []
    for path in Path("/proc/self/task").glob("*/children"):
        try:
            found += map(int, path.read_text(encoding="ascii").split())
        except OSError:  # a thread that ended
            continue
    return found
