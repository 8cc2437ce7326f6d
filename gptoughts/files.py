"""Atomic file writes, file locks, and the user's cache folder."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def cache_dir(*parts: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Return `$XDG_CACHE_HOME/gptoughts/PARTS`, by default below ~/.cache. Does not create it."""
    root = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root).expanduser().joinpath("gptoughts", *parts)


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block succeeds, and is removed when the block fails.

    The temporary name keeps the suffix and holds the process id, so that processes that write the same file do not collide.
    `durable` syncs file and folder, so that the file survives a power loss.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield temporary
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Write a UTF-8 file atomically. Raises OSError."""
    with replacing(path, durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, durable: bool = False) -> None:
    """Write indented JSON atomically, with a final newline. Raises OSError."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n", durable)


def sync(file: IO[Any]) -> None:
    """Flush an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(descriptor: int, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock on an open file or folder; call `waiting` once if another process holds it, then wait."""
    if not try_lock(descriptor):
        waiting()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder exclusively, until it is closed. Returns False if another process holds the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
