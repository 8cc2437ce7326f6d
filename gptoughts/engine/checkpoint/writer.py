"""Write checkpoints in a thread while training continues; keep the newest ones and the best."""

from __future__ import annotations

import json
import math
import shutil
import threading
from pathlib import Path

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
from gptoughts.errors import CheckpointError


class Writer:
    """Checkpoint writer: one snapshot at a time in a thread; keeps the newest `keep` checkpoints and the best one."""

    def __init__(self, folder: Path, keep: int, keep_best: bool, ranks: Ranks | None = None) -> None:
        """Create a writer. `ranks` is given if every rank has one, because each writes a part."""
        self.folder, self._keep, self._keep_best, self._ranks = folder, keep, keep_best, ranks
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, snapshot: Snapshot, val_loss: float | None = None) -> None:
        """Start writing. Waits for the write before; raises CheckpointError if that one failed on any rank."""
        self._join()
        if self._ranks is not None:
            if self._ranks.any(self._error is not None) and self._error is None:
                raise CheckpointError(
                    f"{self.folder}: another rank could not write its part; the previous checkpoint is intact"
                )
            self.wait()
            if self._ranks.first:
                begin(self.folder, snapshot.step)
            self._ranks.barrier()
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(snapshot, val_loss), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the snapshot is on disk. Raises CheckpointError if writing failed."""
        self._join()
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(f"{self.folder}: writing a checkpoint failed: {error}; the previous one is intact") from error

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, snapshot: Snapshot, val_loss: float | None) -> None:
        try:
            if snapshot.rank:
                write_part(snapshot, self.folder)
                return
            path = write(snapshot, self.folder)
            self._abandon_later(path)
            self._note_best(path, val_loss)
            self._drop_old()
        except BaseException as error:
            self._error = error

    def _abandon_later(self, written: Path) -> None:
        """Rename checkpoints of later steps, which are damaged or of an abandoned branch, so that resuming does not find them."""
        for path in all_steps(self.folder):
            if step_of(path) > step_of(written):
                target = path.with_name(f"{ABANDONED}{path.name}")
                shutil.rmtree(target, ignore_errors=True)
                path.rename(target)

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
