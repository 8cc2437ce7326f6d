"""End a run on a signal after the current step, at the same step on all ranks, or save without ending.

SIGINT and SIGTERM come from users and launchers, SIGUSR1 from SLURM before the time limit (`--signal`), SIGHUP from a closed terminal.
SIGUSR2, and a file `save` in the run folder, ask for a checkpoint. Validation, samples and compilation end early for a signal.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from gptoughts.engine.distributed.ranks import Ranks, Vote
from gptoughts.engine.trainer import Progress
from gptoughts.models.torch_internals import is_compiling
from gptoughts.processes import CLOCK

SAVING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that end a run with a checkpoint; the exit code is 128 + the number."""
INTERRUPTING = (signal.SIGINT, signal.SIGTERM)
"""Those that interrupt at once if a signal came before. A launcher may deliver the others twice, to the job and to its steps."""
ASKING = signal.SIGUSR2
"""The signal that asks for a checkpoint without ending the run."""
REQUEST = "save"
"""File in the run folder that asks for a checkpoint; it is removed when it was seen."""
LOOK_SECONDS = 1.0
"""Shortest time between two looks for that file, which may lie on a slow network disk."""
AGAIN_SECONDS = 0.01

Item = TypeVar("Item")


class Interrupted(BaseException):
    """A signal ends the run while it evaluates or generates a sample, which is left incomplete.

    Like KeyboardInterrupt not an Exception: the compiler, in which it may be raised, turns those into failures of its own.
    """


class SecondSignal(KeyboardInterrupt):
    """The second signal that asks for the end. `code` is the exit code."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


class SignalWatcher:
    """Catches signals and tells the loop, once per step, whether the run ends and whether a checkpoint is wanted."""

    def __init__(self, ranks: Ranks, folder: Path | None = None) -> None:
        """Create a watcher. `folder` is the run folder, on the first rank."""
        self.signal: int | None = None
        """The signal that this process received."""
        self.stopped = False
        """Whether all ranks agreed to end the run."""
        self.stepped = False
        """Whether this process made a step, so that there is something to save."""
        self._vote = Vote(ranks) if ranks.size > 1 else None
        self._vote_inside = Vote(ranks) if ranks.size > 1 else None
        self._request = folder / REQUEST if folder is not None and ranks.first else None
        self._looked, self._served = 0.0, 0
        self._wanted = self._save = self._reading = False
        self._raised: int | None = None
        self._dropped: BaseException | None = None

    def asked(self, progress: Progress) -> bool:
        """Return whether any rank received a signal: the same answer on all ranks; with several ranks, one step late."""
        self.stepped = True
        heard, wanted = self.signal is not None, self._wanted or self._requested()
        self._wanted = False
        self.stopped, save = (heard, wanted) if self._vote is None else self._vote.both(heard, wanted)
        self._save = self._save or save
        return self.stopped

    def save_asked(self) -> bool:
        """Return whether a checkpoint was asked for since the last call: the same answer on all ranks."""
        asked, self._save = self._save, False
        return asked

    def _requested(self) -> bool:
        """Return whether the file that asks for a checkpoint appeared; remove it."""
        now = time.monotonic()
        if self._request is None or now - self._looked < LOOK_SECONDS:
            return False
        self._looked = now
        try:
            made = self._request.stat().st_mtime_ns
        except OSError:
            return False
        with suppress(OSError):  # a folder that cannot be changed: asked once, by its time
            self._request.unlink()
        new, self._served = made != self._served, made
        return new

    def until_asked(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield items; raise Interrupted on all ranks when any received a signal. Every rank must have the same number of items."""
        for item in items:
            heard = self.signal is not None
            if heard if self._vote_inside is None else self._vote_inside.both(heard, False)[0]:
                raise Interrupted
            yield item

    @contextmanager
    def interruptible(self, model: nn.Module | None = None) -> Iterator[None]:
        """Let a signal end the block with Interrupted: in a compilation, and before each forward of `model` if it is given.

        The block must change no state of the training. For blocks that run on one rank without the others.
        """

        def check(module: nn.Module, arguments: Any) -> None:
            if self.signal is not None:
                raise Interrupted

        hook = model.register_forward_pre_hook(check) if model is not None else None
        self._reading = self._vote is None
        try:
            yield
        finally:
            self._reading = False
            if hook is not None:
                hook.remove()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals in the block: the first ends the run after the step with a checkpoint, a second Ctrl-C interrupts at once.

        Before the first step there is nothing to save: one rank alone ends at once, several end if no step follows. A signal that the
        process was started to ignore, as SIGHUP under nohup, stays ignored. One that came before, and was lost, ends the process here.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        if CLOCK.heard == signal.SIGINT:
            raise KeyboardInterrupt
        if CLOCK.heard is not None:
            sys.exit(128 + CLOCK.heard)  # its handler has said so
        heeded = [number for number in (*SAVING, ASKING) if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in heeded}
        excused, CLOCK.excused = CLOCK.excused, lambda: self.stepped
        hook, sys.unraisablehook = sys.unraisablehook, partial(self._raise_later, sys.unraisablehook)
        try:
            yield
        finally:
            sys.unraisablehook = hook
            if not self.stepped:
                CLOCK.excused = excused
            for number, handler in before.items():
                signal.signal(number, handler)

    def _raise_later(self, hook: Callable[[Any], Any], unraisable: Any) -> None:
        """Raise what a handler raised a moment later if it ran in a callback, of garbage collection or weak references, that drops it."""
        number, error = self._raised, unraisable.exc_value
        if number is None or not isinstance(error, Interrupted | SecondSignal | SystemExit):
            hook(unraisable)
            return
        self._dropped = error.with_traceback(None)
        threading.Timer(AGAIN_SECONDS, signal.pthread_kill, (threading.main_thread().ident, number)).start()

    def _note(self, number: int, frame: Any) -> None:
        if self._dropped is not None:
            error, self._dropped = self._dropped, None
            raise error
        self._raised = number
        if number == ASKING:
            self._wanted = True
            return
        if self.signal is not None and number in INTERRUPTING:
            raise SecondSignal(number)
        self.signal = self.signal or number
        if self._vote is None and not self.stepped:
            with suppress(OSError):
                os.write(2, f"ended by {signal.Signals(number).name} before the first step; saved checkpoints stay\n".encode())
            sys.exit(128 + number)
        if self._reading and is_compiling():
            raise Interrupted
