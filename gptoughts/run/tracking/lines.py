"""Append-only files of JSON lines that survive a failing disk, and reading them where lines are damaged."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptoughts.console import LOGGER
from gptoughts.files import parse_json, regular

MOST_PENDING = 16 << 20
"""Bytes of lines that are kept in memory while the disk does not take them; the oldest are dropped beyond."""


class LineFile:
    """A file to which lines are appended at once. Lines that the disk does not take are reported once, and written with a later one."""

    def __init__(self, path: Path) -> None:
        """Open or create the file, and end a line that a kill left incomplete. Raises OSError."""
        self._path, self._pending, self._told = path, b"", False
        self._file = os.open(_regular(path), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if is_torn(path):
            self._pending = b"\n"

    def write(self, line: str) -> None:
        """Append a line, without its newline."""
        kept = self._pending[-MOST_PENDING:]
        self._pending = (kept if len(kept) == len(self._pending) else kept.partition(b"\n")[2]) + line.encode() + b"\n"
        try:
            self._flush()
        except OSError as error:
            if not self._told:
                self._told = True
                LOGGER.warning("%s: a row could not be written and is kept for later: %s", self._path, error.strerror or error)

    def _flush(self) -> None:
        while self._pending:
            self._pending = self._pending[os.write(self._file, self._pending) :]
        self._told = False

    def close(self) -> None:
        """Write what is left, if the disk takes it, and close the file."""
        with suppress(OSError):
            self._flush()
        with suppress(OSError):
            os.close(self._file)


def _regular(path: Path) -> Path:
    """Return a path that is no pipe or device, which an open would wait for. Raises OSError."""
    try:
        return regular(path)
    except ValueError:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path)) from None
        raise OSError(errno.EINVAL, "not a regular file", str(path)) from None


def is_torn(path: Path) -> bool:
    """Return whether the last line of a file is incomplete."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return size > 0 and file.read(1) != b"\n"


def read_lines(path: Path, integers: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of a file and the number of lines that are none: cut off, foreign bytes, or without these integer keys.

    Returns no rows where there is no file. Raises OSError for one that cannot be read.
    """
    try:
        content = _regular(path).read_bytes()
    except FileNotFoundError:
        return [], 0
    rows: list[dict[str, Any]] = []
    bad = 0
    for line in content.split(b"\n"):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError:
            bad += 1
            continue
        if isinstance(row, dict) and all(type(row.get(key)) is int for key in integers):
            rows.append(row)
        else:
            bad += 1
    return rows, bad
