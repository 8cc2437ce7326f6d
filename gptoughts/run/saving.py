"""The callback that saves checkpoints: what it refuses to save, how often it tries again, and where the last one goes if it must."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from gptoughts.console import LOGGER
from gptoughts.engine.callback import Callback
from gptoughts.engine.checkpoint.finite import not_finite
from gptoughts.engine.checkpoint.store import Snapshot
from gptoughts.engine.checkpoint.writer import Writer, reason
from gptoughts.engine.distributed.replicas import demand_equal_weights
from gptoughts.engine.engine import Engine
from gptoughts.engine.trainer import Progress, StepStats
from gptoughts.errors import RunError, StorageError, ToldElsewhere
from gptoughts.run.log import every
from gptoughts.run.storage import other_folders

FIX = "free space on that disk, then the same command again"


@dataclass
class Save(Callback):
    """Saves checkpoints in the background while training continues; waits for the last one.

    A write that fails is tried again at the next save. After `failures` of them in a row, and for the last checkpoint of a run, it is
    written while training waits; if that fails twice, it goes to another folder with space, and the run ends with StorageError.
    """

    phase = "save"
    touches_weights = True
    on_stop = True
    period: int
    writer: Writer | None
    """None on ranks that do not write."""
    take: Callable[[Engine, Progress], Snapshot | None]
    """A collective. Returns None on ranks that do not write."""
    criterion: Callable[[], tuple[int, float] | None] = lambda: None
    """(step, value) of the newest validation, lower being better."""
    failures: int = 3
    asked: Callable[[], bool] = lambda: False
    """Whether somebody asked for a checkpoint after this step; the same on all ranks. Asking is over when it was read."""
    settle: Callable[[Engine], None] = lambda engine: None
    """Judges the steps that are not judged yet. Raises for a bad one."""
    broken: Callable[[Engine, Progress, str], None] = lambda engine, progress, what: None
    """Called on every rank, with words for what is not finite, before the run ends for it. May raise to continue otherwise."""
    _failed: int = 0
    """Writes that failed since the last that did not, on any rank."""

    def due(self, step: int, last: bool) -> bool:
        """Due each `period` steps, when asked for, and at the last."""
        return self.asked() or every(self.period, step, last)

    def on_step(self, engine: Engine, progress: Progress, stats: StepStats, last: bool) -> None:
        """Copy the state and hand it to the writer. Raises RunError for weights, optimizer state or a gradient that is not finite."""
        self.settle(engine)
        self._demand_finite(engine, progress, stats)
        demand_equal_weights(engine)
        error = self.writer.failure() if self.writer is not None else None
        self._failed = self._failed + 1 if engine.ranks.any(error is not None) else 0
        taken, value = self.take(engine, progress), self._value(progress)
        if last or self._failed >= self.failures:
            self._write_and_wait(engine, taken, value)
            self._failed = 0
        elif self.writer is not None and taken is not None:
            self.writer.save(taken, value)

    def _demand_finite(self, engine: Engine, progress: Progress, stats: StepStats) -> None:
        finite = torch.isfinite(stats.grad_norm).item() and torch.isfinite(stats.loss_sum).item()
        wrong = "" if finite or engine.skips_bad_steps else "gradient is"
        names = [] if wrong else not_finite(engine)
        bad = bool(wrong or names)
        if not engine.ranks.any(bad):
            return
        what = wrong or (f"weights or optimizer state ({', '.join(names[:3])}) are" if names else "weights of another rank are")
        self.broken(engine, progress, what)
        if not engine.ranks.first:
            raise ToldElsewhere
        kept = self.writer.kept() if self.writer is not None else ""
        raise RunError(
            f"step {progress.step}: {what} not finite; no checkpoint is written, {kept}",
            fix="a lower --optim.learning-rate, or --layer.precision fp32",
        )

    def _value(self, progress: Progress) -> float | None:
        newest = self.criterion()
        return newest[1] if newest is not None and newest[0] == progress.step else None

    def _write_and_wait(self, engine: Engine, taken: Snapshot | None, value: float | None) -> None:
        """Write a checkpoint now, twice if need be. Raises StorageError if it could not be written where the run keeps its checkpoints."""
        for _ in range(2):
            why = self._write(engine, taken, value)
            if not why:
                return
        place = next(iter(self._elsewhere(engine, taken, value)), None)
        if not engine.ranks.first:
            silent = ToldElsewhere()
            silent.exit_code = StorageError.exit_code
            raise silent
        assert self.writer is not None
        problem = f"{self.writer.folder}: the checkpoint could not be written ({why})"
        if place is None:
            raise StorageError(f"{problem}, and no other folder takes it; {self.writer.kept()}", fix=FIX)
        raise StorageError(f"{problem}; it is in {place}", fix=f"{FIX} and --resume {place}")

    def _write(self, engine: Engine, taken: Snapshot | None, value: float | None, folder: Path | None = None) -> str:
        """Write and wait. Returns why it failed on any rank, an empty string if it did not. A collective."""
        error = None
        if self.writer is not None and taken is not None:
            self.writer.save(taken, value, folder)
            error = self.writer.failure()
        failed = engine.ranks.any(error is not None)
        return reason(error) if error is not None else "another rank failed" if failed else ""

    def _elsewhere(self, engine: Engine, taken: Snapshot | None, value: float | None) -> Iterator[Path]:
        """Write the checkpoint into another folder of this machine. Yields its path, or nothing if none takes it. A collective."""
        if not engine.ranks.world.on_one_machine:
            return
        parts = taken.tensors.values() if taken is not None else ()
        mine = sum(tensor.nbytes for tensors in parts for tensor in tensors.values())
        needed = int(1.01 * float(engine.ranks.sum(float(mine)).item())) + (1 << 20)
        found = other_folders(needed) if engine.ranks.first else iter(())
        while True:
            place = engine.ranks.texts(_private(found) if engine.ranks.first else "-")[0]
            if place == "-":
                return
            if not self._write(engine, taken, value, Path(place)):
                step = next(iter(sorted(Path(place).glob("step-*"))), Path(place))
                LOGGER.warning("the checkpoint is in %s", step)
                yield step
                return
            if engine.ranks.first:
                shutil.rmtree(place, ignore_errors=True)


def _private(folders: Iterator[Path]) -> str:
    """Create a folder below the first of `folders` that takes one, for this user alone. Returns its path, `-` if none does."""
    for folder in folders:
        with suppress(OSError):
            return tempfile.mkdtemp(prefix="gptoughts-", dir=folder)
    return "-"
