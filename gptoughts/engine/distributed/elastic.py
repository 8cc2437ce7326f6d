"""Run processes with torchrun's launcher from inside this one: exit codes and signals without its own tables and tracebacks."""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.run import parse_args, run

from gptoughts.hardware.endpoint import LOOPBACK, MEETING_FILE
from gptoughts.processes import CLOCK, module_words

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def run_ranks(ranks: int, words: Sequence[str]) -> int:
    """Run `gptoughts WORDS` in `ranks` processes. Returns the exit code of the first that failed, 0 without a failure."""
    # The ranks print their own errors; the launcher would add a table and a traceback of itself.
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    python, *begin = module_words("gptoughts")
    backend = ["--rdzv-backend", OneMachine.BACKEND, "--rdzv-id", str(uuid.uuid4())]
    arguments = parse_args([*backend, "--nproc-per-node", str(ranks), "--no-python", python])
    # Past its parser, which takes abbreviations of its options for its own.
    arguments.training_script_args = ["-u", *begin, *words]
    rendezvous_handler_registry.register(OneMachine.BACKEND, OneMachine.made)
    with _meeting_place(), _forwarding() as received:
        try:
            run(arguments)
        except ChildFailedError as error:
            failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
            return exit_code([failure.exitcode for failure in failures])
        except SignalException as error:
            return 128 + int(error.sigval)
    return 128 + received[0] if received else 0


class OneMachine(RendezvousHandler):
    """A rendezvous of one agent with itself: torchrun's own listens on all addresses and unpickles what it finds in its store."""

    BACKEND = "gptoughts"

    def __init__(self, run_id: str) -> None:
        self._run_id, self._closed = run_id, False

    @classmethod
    def made(cls, parameters: RendezvousParameters) -> OneMachine:
        """Return a handler; the registry wants one and the same function at every run."""
        return cls(parameters.run_id)

    def get_backend(self) -> str:
        """Return the name of this kind."""
        return self.BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """Return a store in this process. The ranks get an address for libraries that want one; nothing of ours listens there."""
        return RendezvousInfo(dist.HashStore(), 0, 1, RendezvousStoreInfo(LOOPBACK, _free_port()))

    def is_closed(self) -> bool:
        """Return whether the ranks may not start again."""
        return self._closed

    def set_closed(self) -> None:
        """Let the ranks not start again."""
        self._closed = True

    def num_nodes_waiting(self) -> int:
        """Return 0: no other machine joins."""
        return 0

    def get_run_id(self) -> str:
        """Return the id of this job."""
        return self._run_id

    def shutdown(self) -> bool:
        """Return True: nothing is open."""
        return True


@contextmanager
def _meeting_place() -> Iterator[None]:
    """Name a file in a folder of this user alone where the ranks meet, for the block."""
    with tempfile.TemporaryDirectory(prefix="gptoughts-") as folder:  # mode 0700
        os.environ[MEETING_FILE] = str(Path(folder) / "meeting")
        try:
            yield
        finally:
            del os.environ[MEETING_FILE]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind((LOOPBACK, 0))
        return int(one.getsockname()[1])


def exit_code(codes: Sequence[int]) -> int:
    """Return the code of the first rank that exited by itself; else 128 + the signal that killed the first one.

    The launcher ends the other ranks with a signal once one has failed.
    """
    own = [code for code in codes if code > 0]
    return own[0] if own else 128 - codes[0]


@contextmanager
def _forwarding() -> Iterator[list[int]]:
    """Send signals on to the ranks, which save and exit; torchrun's own handler would kill them after 30 seconds.

    This process waits for the ranks, however long they save: the clock of signals would end it. Yields the received signals that end a run.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # of another program, which handles signals itself
        yield received
        return

    def forward(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGUSR2:  # asks for a checkpoint
            received.append(number)
        for child in _children():
            os.kill(child, number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    excused, CLOCK.excused = CLOCK.excused, lambda: True
    try:
        yield received
    finally:
        CLOCK.excused = excused
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
