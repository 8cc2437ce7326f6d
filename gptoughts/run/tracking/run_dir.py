"""The two folders of a run: out/<run>/ for results, checkpoints/<run>/ to resume from. One process at a time."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gptoughts.errors import RunError
from gptoughts.files import try_lock, write_text


@dataclass
class RunFolder:
    """Where a run writes. `lock` keeps other processes out until this one ends, however it ends."""

    name: str
    out: Path
    checkpoints: Path
    _lock: IO[str] | None = None

    @contextmanager
    def locked(self, mine: bool = True) -> Iterator[None]:
        """Hold the folder during the block. `mine` is False on ranks that do not write, which take no lock."""
        try:
            if mine:
                self.lock()
            yield
        finally:
            self.release()

    def lock(self) -> None:
        """Create and lock the folder. Raises RunError if another process holds it."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        file = (self.out / ".lock").open("a+", encoding="ascii")
        if not try_lock(file.fileno()):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise RunError(f"{self.out}: run folder is in use", found=f"process {holder}", fix="--name with another name")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._lock = file

    def release(self) -> None:
        """Unlock; remove the folder if this run created it and wrote nothing."""
        if self._lock is None:
            return
        if [path.name for path in self.out.iterdir() if path != self.checkpoints] == [".lock"] and not any(
            self.checkpoints.iterdir()
        ):
            (self.out / ".lock").unlink()
            for empty in (self.checkpoints, self.out):
                empty.rmdir()
        self._lock.close()
        self._lock = None


def run_id(folder: RunFolder, checkpoint: Path | None, saved: str | None) -> str:
    """Return the name of the run at trackers: that of the checkpoint it resumes from, else the one in OUT/run_id, else a new one.

    A checkpoint of another run folder begins a new run. `saved` is the name in the checkpoint, None in those of earlier versions.
    """
    file = folder.out / "run_id"
    own = checkpoint is not None and checkpoint.resolve().parent == folder.checkpoints.resolve()
    known = (saved if own else None) or (file.read_text(encoding="ascii").strip() if file.is_file() else "")
    found = known or secrets.token_hex(4)
    write_text(file, found + "\n")
    return found


def run_folder(name: str, run_dir: str | None) -> RunFolder:
    """Return `out/NAME` and `checkpoints/NAME` under the current folder, or `run_dir` and `run_dir/checkpoints`."""
    if run_dir is not None:
        return RunFolder(Path(run_dir).name, Path(run_dir), Path(run_dir) / "checkpoints")
    if not name or "/" in name or name.startswith("."):
        raise RunError(f"--name: {name!r} is not a folder name", fix="letters, digits, - and _")
    return RunFolder(name, Path("out") / name, Path("checkpoints") / name)
