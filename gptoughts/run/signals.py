"""End a run on a signal after the current step, at the same step on all ranks.

SIGINT and SIGTERM come from users and launchers, SIGUSR1 from SLURM before the time limit (`--signal`), SIGHUP from a closed terminal.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gptoughts.engine.distributed.ranks import Ranks, Vote
from gptoughts.engine.trainer import Progress

SAVING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that end a run with a checkpoint; the exit code is 128 + the number."""
INTERRUPTING = (signal.SIGINT, signal.SIGTERM)
"""Those that interrupt at once if a signal came before. A launcher may deliver the others twice, to the job and to its steps."""


class SignalWatcher:
    """Catches signals and tells the loop, once per step, whether the run ends."""

    def __init__(self, ranks: Ranks) -> None:
        self.signal: int | None = None
        """The signal that this process received."""
        self.stopped = False
        """Whether all ranks agreed to end the run."""
        self._vote = Vote(ranks) if ranks.size > 1 else None

    def asked(self, progress: Progress) -> bool:
        """Return whether any rank received a signal: the same answer on all ranks; with several ranks, one step late."""
        heard = self.signal is not None
        self.stopped = heard if self._vote is None else self._vote.heard(heard)
        return self.stopped

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals in the block: the first ends the run after the step with a checkpoint, a second Ctrl-C interrupts at once.

        A signal that the process was started to ignore, as SIGHUP under nohup, stays ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            if self.signal is not None and number in INTERRUPTING:
                raise KeyboardInterrupt
            self.signal = self.signal or number

        heeded = [number for number in SAVING if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, note) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
