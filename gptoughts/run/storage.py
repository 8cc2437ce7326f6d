"""Storage of a run: folders that must be writable before anything long starts, space for checkpoints, and other folders for the last one."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptoughts.console import LOGGER, bytes_in_words, redacted
from gptoughts.engine.checkpoint import store
from gptoughts.engine.engine import Engine
from gptoughts.errors import RunError
from gptoughts.files import (
    PATH_ERRORS,
    cache_dir,
    free_bytes,
    load_json,
    make_private,
    open_to_all,
    scratch_dir,
    write_json,
    writing_problem,
)
from gptoughts.models.sources import shape_of
from gptoughts.run.tracking.run_dir import RunFolder

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
"""Errors of a disk that is full, read-only or failing."""

TEMPORARY_VARIABLES = ("TMPDIR", "TEMP", "TMP")
MOMENT_BYTES = 2 * 4
"""Optimizer state per trained parameter before the first step: two float32 moments, as AdamW has."""
CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@contextmanager
def run_storage(folder: RunFolder | None, first: bool) -> Iterator[None]:
    """Try, lock and clean the folders of a run before anything long starts, and hold them during the block.

    Raises RunError with the path and what to set, also for a disk that fails in the block where nothing else handles it.
    """
    with storage_errors():
        if folder is None:
            yield
            return
        check_temporary()
        with folder.locked(first):
            if first:
                store.clean(folder.checkpoints)  # a kill can leave a checkpoint hidden while it was replaced
            yield


@contextmanager
def storage_errors() -> Iterator[None]:
    """Raise RunError for an error of a disk, or of a path that is of another kind, which are no errors of the program."""
    try:
        yield
    except OSError as error:
        if error.errno in PATH_ERRORS and error.filename and error.errno not in DISK_ERRORS:
            named = error.filename2 or error.filename
            fix = "remove or rename it, or start a new run with another --name or --run-dir"
            raise RunError(f"{named}: {error.strerror}", fix=fix) from error
        if error.errno not in DISK_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        fix = "--run-dir, --data.cache, XDG_CACHE_HOME or TMPDIR with a folder on another disk"
        raise RunError(f"{where}{error.strerror}", fix=fix) from error


def write_record(path: Path, value: Any) -> None:
    """Write a JSON file that training can do without; warn where it cannot be written."""
    try:
        write_json(path, redacted(value))
    except OSError as error:
        LOGGER.warning("%s: cannot be written: %s", path, error.strerror or error)


def check_temporary(environment: Mapping[str, str] = os.environ) -> None:
    """Raise RunError if the folder of temporary files, or a compiler's cache that a variable names, cannot be written."""
    named = next((name for name in TEMPORARY_VARIABLES if environment.get(name)), None)
    if named is None:
        try:
            tempfile.gettempdir()
        except OSError as error:
            raise RunError("TMPDIR: no folder for temporary files", found=error.strerror, fix="export TMPDIR=DIR") from None
    else:
        _require(named, Path(environment[named]))
    for name in CACHE_VARIABLES:
        folder = Path(environment[name]) if environment.get(name) else None
        if folder is not None and folder.exists():  # its compiler creates it otherwise
            _require(name, folder)
            _check_writers(name, folder)


def _require(name: str, folder: Path) -> None:
    problem = writing_problem(folder)
    if problem:
        fix = f"export {name}=DIR with a folder on a disk that can be written and has space"
        raise RunError(f"{name}: {folder} cannot be written ({problem})", fix=fix)


def _check_writers(name: str, folder: Path) -> None:
    """Raise RunError if everybody can write a compiler's cache, whose files are executed; warn if a group or another user can."""
    place = open_to_all(folder)
    if place is not None:
        raise RunError(f"{name}: everybody can write {place}, and cached code is executed", fix=f"chmod o-w {place}")
    state = folder.stat()
    if state.st_uid not in (0, os.geteuid()):
        LOGGER.warning("%s: %s belongs to user %d, and cached code is executed", name, folder, state.st_uid)
    elif state.st_mode & stat.S_IWGRP and state.st_gid != state.st_uid:  # each user's own group has the user's number
        LOGGER.warning("%s: group %d can write %s, and cached code is executed", name, state.st_gid, folder)


def checkpoint_bytes(engine: Engine, resumed: Path | None, trained_only: bool) -> int:
    """Return the size of a checkpoint: that of the one resumed from, else weights and two float32 moments per trained parameter."""
    if resumed is not None:
        files = load_json(resumed / "manifest.json")["files"]
        return sum(entry["bytes"] for entry in files.values())
    total = 0
    for parameter in engine.bare.parameters():
        size = shape_of(parameter).numel()
        if parameter.requires_grad:
            total += size * MOMENT_BYTES
        if parameter.requires_grad or not trained_only:
            total += size * parameter.element_size()
    return total


def space_problem(folder: Path, one: int) -> str:
    """Return a line if the file system of `folder` has no space for two checkpoints of `one` bytes, else an empty string."""
    free = free_bytes(folder)
    if free is None or free >= 2 * one:
        return ""
    return (
        f"{folder}: {bytes_in_words(free)} free, two checkpoints take {bytes_in_words(2 * one)}. "
        "Try: --run-dir DIR on a larger disk, or fewer files on this one; training goes on"
    )


def other_folders(needed: int, environment: Mapping[str, str] = os.environ) -> Iterator[Path]:
    """Yield folders outside the run's own that can be written and have `needed` bytes: scratch, temporary files, the user's cache."""
    candidates = [scratch_dir(environment), _temporary(environment), cache_dir("rescued", environment=environment)]
    seen: set[Path] = set()
    for folder in candidates:
        if folder is None or folder in seen:
            continue
        seen.add(folder)
        if folder == candidates[-1]:
            try:
                make_private(folder)
            except OSError:
                continue
        free = free_bytes(folder)
        if (free is None or free >= needed) and not writing_problem(folder):
            yield folder


def _temporary(environment: Mapping[str, str]) -> Path | None:
    named = next((environment[name] for name in TEMPORARY_VARIABLES if environment.get(name)), None)
    try:
        return Path(named or tempfile.gettempdir())
    except OSError:
        return None
