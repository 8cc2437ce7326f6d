"""The two folders of a run: out/<run>/ for results, checkpoints/<run>/ to resume from. One process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gptoughts.errors import RunError
from gptoughts.files import try_lock


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


def run_folder(name: str, run_dir: str | None) -> RunFolder:
    """Return `out/NAME` and `checkpoints/NAME` under the current folder, or `run_dir` and `run_dir/checkpoints`."""
    if run_dir is not None:
        return RunFolder(Path(run_dir).name, Path(run_dir), Path(run_dir) / "checkpoints")
    if not name or "/" in name or name.startswith("."):
        raise RunError(f"--name: {name!r} is not a folder name", fix="letters, digits, - and _")
    return RunFolder(name, Path("out") / name, Path("checkpoints") / name)
