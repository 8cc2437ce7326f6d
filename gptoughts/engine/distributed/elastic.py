"""Run processes with torchrun's launcher from inside this one: exit codes and signals without its own tables and tracebacks."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def run_ranks(ranks: int, words: Sequence[str]) -> int:
    """Run `gptoughts WORDS` in `ranks` processes. Returns the exit code of the first that failed, 0 without a failure."""
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
            return exit_code([failure.exitcode for failure in failures])
        except SignalException as error:
            return 128 + int(error.sigval)
    return 128 + received[0] if received else 0


def exit_code(codes: Sequence[int]) -> int:
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
