"""Lock a tokenized folder, and remove only the files that tokenizing wrote."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptoughts.console import LOGGER
from gptoughts.data.text import tasks
from gptoughts.data.text.shards import INDEX, JOURNAL, TOKENIZER_FOLDER, VERIFIED
from gptoughts.errors import DataError
from gptoughts.files import TEMPORARY, make_private, try_lock, wait_for_lock

FIX = "a folder on a disk that can be written: --to, --data.cache or XDG_CACHE_HOME"


def is_ours(name: str) -> bool:
    """Whether tokenizing writes files of this name."""
    base = name.replace(TEMPORARY, "")
    return (
        base in (INDEX, JOURNAL, TOKENIZER_FOLDER, tasks.FOLDER)
        or base.startswith(Path(VERIFIED).stem)
        or (base.startswith(("train_", "val_")) and base.endswith((".npy", ".npy.part")))
    )


def clear(folder: Path) -> None:
    """Remove the files that tokenizing wrote in `folder`, the index first."""
    (folder / INDEX).unlink(missing_ok=True)
    for path in folder.iterdir():
        if is_ours(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Create `folder` and lock it; a second process waits. The lock is on the folder itself, without a lock file."""
    created = not folder.exists()
    while True:
        try:
            make_private(folder)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise DataError(f"{folder}: cannot be created or opened as a folder ({error.strerror})", fix=FIX) from None
        if not try_lock(descriptor):
            LOGGER.info(f"data: another process is tokenizing into {folder}, waiting")
            wait_for_lock(descriptor)
        if folder.exists() and folder.stat().st_ino == os.fstat(descriptor).st_ino:
            break
        os.close(descriptor)  # The first process failed and removed the folder: create it again.
    try:
        yield
    finally:
        if created and not any(folder.iterdir()):
            folder.rmdir()
        os.close(descriptor)
