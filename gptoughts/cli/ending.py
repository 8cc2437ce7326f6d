"""End a command with one line and code 128 + N at a signal N, until training handles signals by itself."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from gptoughts.planning.environment import Process
from gptoughts.processes import CLOCK

ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that Python does not handle by itself and that end a run."""
IGNORED = signal.SIGUSR2
"""Asks for a checkpoint, of which there is none before training."""


def end_at_signals() -> None:
    """Handle signals from now on, and those that were held back; inside another program do nothing.

    A signal that the process was started to ignore, as SIGHUP under nohup, stays ignored.
    """
    context = click.get_current_context(silent=True)
    if context is None or context.find_root().obj is not Process.OURS:
        return
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    if signal.getsignal(IGNORED) is signal.SIG_DFL:
        signal.signal(IGNORED, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*ENDING, IGNORED, signal.SIGINT))
    CLOCK.start((*ENDING, signal.SIGINT))


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold signals back during the block. If the process replaces itself in the block, the new program gets them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*ENDING, IGNORED, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(number: int, frame: Any) -> None:
    for other in ENDING:
        if signal.getsignal(other) is _end:
            signal.signal(other, _end_at_once)
    with suppress(OSError):
        os.write(2, f"ended by {signal.Signals(number).name}; saved checkpoints stay\n".encode())
    sys.exit(128 + number)  # what is open is undone now


def _end_at_once(number: int, frame: Any) -> None:
    os._exit(128 + number)
