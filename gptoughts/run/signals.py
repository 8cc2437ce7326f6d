"""Ends a run on SIGINT or SIGTERM, after a whole step, on all ranks at the same one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gptoughts.engine.distributed.ranks import Ranks, Vote
from gptoughts.engine.trainer import Progress


class SignalWatcher:
    """Hears signals and answers, once a step, whether the run ends here."""

    def __init__(self, ranks: Ranks) -> None:
        self.signal: int | None = None
        """The signal that this process got."""
        self.stopped = False
        """Whether the ranks agreed to end the run."""
        self._vote = Vote(ranks) if ranks.size > 1 else None

    def asked(self, progress: Progress) -> bool:
        """Whether a signal reached any rank: the same answer on all of them, for several ranks one step late."""
        heard = self.signal is not None
        self.stopped = heard if self._vote is None else self._vote.heard(heard)
        return self.stopped

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The first signal ends the run after the step, with a checkpoint; the second interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = number

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
