"""End a run on SIGINT or SIGTERM after the current step, at the same step on all ranks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gptoughts.engine.distributed.ranks import Ranks, Vote
from gptoughts.engine.trainer import Progress


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
        """Handle signals in the block: the first ends the run after the step with a checkpoint, the second interrupts at once."""
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
