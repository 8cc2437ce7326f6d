"""The two folders of a run: out/<run>/ for results, checkpoints/<run>/ to resume from. One process at a time."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from gptoughts.console import LOGGER
from gptoughts.errors import RunError
from gptoughts.files import is_file_name, make_private, read_limited, try_lock, write_text, writing_problem

LOCK = ".lock"
"""File in the folder of checkpoints with the process that holds it; also the lock itself where folders cannot be locked (NFS)."""
FIX = "--run-dir DIR on a disk that can be written and has space"


@dataclass
class RunFolder:
    """Where a run writes. The lock is on the folder of checkpoints and keeps other processes out until this one ends, however it ends."""

    name: str
    out: Path
    checkpoints: Path
    fresh: bool = False
    """Whether the folders must not exist, as for a run without a name: another name is taken if they do."""
    _lock: int | None = None

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
        """Create, lock and try the folders. Raises RunError if another process holds them or they cannot be written."""
        try:
            self._create()
            self._lock = self._locked()
        except OSError as error:
            problem = error.strerror or str(error)
            raise RunError(f"{error.filename or self.out}: cannot be written ({problem})", fix=FIX) from None
        for folder in (self.out, self.checkpoints):
            problem = writing_problem(folder)
            if problem:
                raise RunError(f"{folder}: cannot be written ({problem})", fix=FIX)
        with suppress(OSError):
            (self.checkpoints / LOCK).write_text(f"{os.getpid()} on {socket.gethostname()}", encoding="utf-8")

    def agree(self, texts: Callable[[str], list[str]]) -> None:
        """Take the folders of rank 0 where each rank chose a name by its clock. `texts` returns the text of every rank, a collective."""
        name, out, checkpoints = texts("\n".join((self.name, str(self.out), str(self.checkpoints))))[0].split("\n")
        if self.fresh:
            self.name, self.out, self.checkpoints = name, Path(out), Path(checkpoints)

    def _create(self) -> None:
        if self.fresh:
            name, parents = self.name, (self.out.parent, self.checkpoints.parent)
            for number in count(2):
                try:
                    make_private(self.out, new=True)
                    break
                except FileExistsError:  # a run that started in the same second
                    self.name = f"{name}-{number}"
                    self.out, self.checkpoints = (parent / self.name for parent in parents)
        make_private(self.out)
        make_private(self.checkpoints)

    def _locked(self) -> int | None:
        """Lock the folder of checkpoints itself, which cannot be removed by itself as a file can. Returns the descriptor."""
        descriptor = os.open(self.checkpoints, os.O_RDONLY | os.O_DIRECTORY)
        try:
            mine = try_lock(descriptor)
        except OSError:  # NFS locks only files that are open for writing
            os.close(descriptor)
            descriptor = os.open(self.checkpoints / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                mine = try_lock(descriptor)
            except OSError:
                LOGGER.warning("%s: this file system has no locks; do not start this run twice at a time", self.checkpoints)
                mine = True
        if mine:
            return descriptor
        os.close(descriptor)
        raise RunError(f"{self.out}: run folder is in use", found=f"process {self._holder()}", fix="--name with another name")

    def _holder(self) -> str:
        try:
            return (self.checkpoints / LOCK).read_text(encoding="utf-8", errors="replace").strip()[:200] or "unknown"
        except OSError:
            return "unknown"

    def release(self) -> None:
        """Unlock; remove the folders if nothing was written into them."""
        if self._lock is None:
            return
        with suppress(OSError):
            if {path.name for path in self.out.iterdir() if path != self.checkpoints} <= {LOCK} and {
                path.name for path in self.checkpoints.iterdir()
            } <= {LOCK}:
                for folder in (self.checkpoints, self.out):
                    (folder / LOCK).unlink(missing_ok=True)
                    folder.rmdir()
        os.close(self._lock)
        self._lock = None


def run_id(folder: RunFolder, checkpoint: Path | None, saved: str | None) -> str:
    """Return the name of the run at trackers: that of the checkpoint it resumes from, else the one in OUT/run_id, else a new one.

    A checkpoint of another run folder begins a new run. `saved` is the name in the checkpoint, None in those of earlier versions.
    """
    file = folder.out / "run_id"
    own = checkpoint is not None and checkpoint.resolve().parent == folder.checkpoints.resolve()
    noted = ""
    with suppress(OSError, ValueError):
        noted = read_limited(file).decode("ascii", errors="replace").strip()
    known = (saved if own else None) or (noted if noted.isalnum() and noted.isascii() else "")
    found = known or secrets.token_hex(4)
    try:
        write_text(file, found + "\n")
    except OSError as error:
        LOGGER.warning("%s: cannot be written: %s; the checkpoints have it", file, error.strerror or error)
    return found


def run_folder(name: str, run_dir: str | None, fresh: bool = False) -> RunFolder:
    """Return `out/NAME` and `checkpoints/NAME` under the current folder, or `run_dir` and `run_dir/checkpoints`.

    `fresh` takes another name if the folders exist, for a run that the user did not name.
    """
    if run_dir is not None:
        return RunFolder(Path(run_dir).name, Path(run_dir), Path(run_dir) / "checkpoints")
    if not is_file_name(name) or not name.isprintable() or name.startswith("."):
        raise RunError(f"--name: {ascii(name)[:200]} is not a folder name", fix="letters, digits, - and _")
    return RunFolder(name, Path("out") / name, Path("checkpoints") / name, fresh)
