"""Write checkpoints in a thread while training continues; keep the newest ones and the best.

A write that fails is reported at once and frees what it wrote; earlier checkpoints stay. The caller reads the failure with `failure` before the
next save and decides how often it tries again.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
from itertools import count
from pathlib import Path

from gptoughts.console import LOGGER
from gptoughts.engine.checkpoint.store import (
    ABANDONED,
    DROPPED,
    Snapshot,
    all_steps,
    begin,
    best,
    point,
    step_of,
    write,
    write_part,
)
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.errors import StorageError


class Writer:
    """Checkpoint writer: one snapshot at a time in a thread; keeps the newest `keep` checkpoints and the best one."""

    def __init__(self, folder: Path, keep: int, keep_best: bool, ranks: Ranks | None = None) -> None:
        """Create a writer. `ranks` is given if every rank has one, because each writes a part."""
        self.folder, self._keep, self._keep_best, self._ranks = folder, keep, keep_best, ranks
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.wrote = False
        """Whether a checkpoint was written to the writer's own folder."""

    def save(self, snapshot: Snapshot, val_loss: float | None = None, folder: Path | None = None) -> None:
        """Start writing, after the write before has ended. A collective if every rank writes. `folder` replaces the writer's own."""
        self._join()
        if self._ranks is not None:
            if self._ranks.first:
                try:
                    begin(folder or self.folder, snapshot.step, snapshot.ranks)
                except OSError as error:
                    self._fail(snapshot.step, error)
            if self._ranks.any(self._error is not None):
                self._error = self._error or StorageError(f"{self.folder}: another rank could not begin a checkpoint")
                return
        self._thread = threading.Thread(target=self._write, args=(snapshot, val_loss, folder), name="checkpoint")
        self._thread.start()

    def failure(self) -> BaseException | None:
        """Wait for the write; return why it failed, None if it did not. The next call returns None."""
        self._join()
        error, self._error = self._error, None
        return error

    def kept(self) -> str:
        """Return words for messages about what is there: the newest checkpoint, or none."""
        try:
            there = all_steps(self.folder)
        except OSError:
            return "earlier checkpoints cannot be listed"
        return f"{there[0].name} stays" if there else "there is no earlier checkpoint"

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _fail(self, step: int, error: BaseException) -> None:
        self._error = error
        LOGGER.warning("step %d: writing the checkpoint failed: %s; %s", step, reason(error), self.kept())

    def _write(self, snapshot: Snapshot, val_loss: float | None, folder: Path | None) -> None:
        try:
            if snapshot.rank:
                write_part(snapshot, folder or self.folder)
                return
            path = write(snapshot, folder or self.folder)
        except BaseException as error:
            self._fail(snapshot.step, error)
            return
        if folder is not None:
            return
        self.wrote = True
        try:
            self._abandon_later(path)
            self._note_best(path, val_loss)
            self._drop_old()
        except OSError as error:  # the checkpoint is complete; the next save tries this again
            LOGGER.warning("%s: old checkpoints could not be put in order: %s", self.folder, reason(error))

    def _abandon_later(self, written: Path) -> None:
        """Rename checkpoints of later steps, which are damaged or of an abandoned branch, so that resuming does not find them."""
        for path in all_steps(self.folder):
            if step_of(path) > step_of(written):
                names = (f"{ABANDONED}{path.name}{'' if number == 1 else f'.{number}'}" for number in count(1))
                path.rename(next(target for target in map(path.with_name, names) if not target.exists()))

    def _note_best(self, path: Path, val_loss: float | None) -> None:
        if val_loss is None or not math.isfinite(val_loss):
            return
        before = best(self.folder)
        if before is not None and not (self.folder / before[0]).is_dir():
            before = None
        if before is None or val_loss < before[1]:
            point(self.folder / "best", json.dumps({"checkpoint": path.name, "val_loss": val_loss}))

    def _drop_old(self) -> None:
        chosen = best(self.folder) if self._keep_best else None
        for path in all_steps(self.folder)[self._keep :]:
            if chosen is None or path.name != chosen[0]:
                target = path.with_name(f"{DROPPED}{path.name}")
                path.rename(target)  # renamed first, so that a kill leaves no half-deleted checkpoint
                shutil.rmtree(target)


def reason(error: BaseException) -> str:
    """Return one line for an error of a write: the file and what the system says."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
