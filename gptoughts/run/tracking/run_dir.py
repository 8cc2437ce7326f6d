"""The two folders of a run: what happened in out/<run>/, what can be continued in checkpoints/<run>/. One process at a time."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gptoughts.errors import RunError


@dataclass
class RunFolder:
    """Where a run writes. `lock` keeps a second process out until this one ends, however it ends."""

    name: str
    out: Path
    checkpoints: Path
    _lock: IO[str] | None = None

    def lock(self) -> None:
        """Take the folder, creating it. Raises RunError where another process holds it."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        file = (self.out / ".lock").open("a+", encoding="ascii")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise RunError(
                f"run folder {self.out} is in use by process {holder}\n  try: --run NAME with another name"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._lock = file

    def release(self) -> None:
        """Let others in. A folder that this run made and wrote nothing into goes with it."""
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
    """`out/NAME` and `checkpoints/NAME` under the current folder, or `run_dir` and `run_dir/checkpoints`."""
    if run_dir is not None:
        return RunFolder(Path(run_dir).name, Path(run_dir), Path(run_dir) / "checkpoints")
    if not name or "/" in name or name.startswith("."):
        raise RunError(f"--run {name!r} cannot be a folder's name; take letters, digits, - and _")
    return RunFolder(name, Path("out") / name, Path("checkpoints") / name)
