"""metrics.jsonl: one row per logged step, append-only. All reports read this file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptoughts.console import LOGGER
from gptoughts.run.tracking.lines import LineFile, read_lines
from gptoughts.run.tracking.metrics import RENAMED
from gptoughts.run.tracking.sink import RunInfo, Sink

FILE = "metrics.jsonl"


class Jsonl(Sink):
    """Appends rows with their step and attempt. Every row is flushed before the next."""

    _file: LineFile | None = None
    _attempt = 1

    def start(self, run: RunInfo) -> None:
        """Open the file for appending; end a line that a kill left incomplete."""
        self._file, self._attempt = LineFile(run.out / FILE), run.attempt

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one row."""
        assert self._file is not None, "start comes first"
        self._file.write(json.dumps({"step": step, "attempt": self._attempt, **values}))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def attempts(path: Path) -> int:
    """Return how many attempts of the run wrote rows to `path`. Lines that are no rows are counted in a note."""
    rows, bad = read_lines(path, ("step", "attempt"))
    if bad > 1:  # one is the line that a kill cut off
        LOGGER.warning("%s: %d lines are no rows and are left out", path, bad)
    return max((row["attempt"] for row in rows), default=0)


def read(path: Path) -> list[dict[str, Any]]:
    """Return rows in step order. Rows that a later attempt repeated are replaced by its rows; an incomplete last line is dropped.

    Keys of earlier versions are returned under their present names.
    """
    rows = _rows(path)
    first: dict[int, int] = {}
    for row in rows:
        first[row["attempt"]] = min(first.get(row["attempt"], row["step"]), row["step"])
    kept = [row for row in rows if not any(later > row["attempt"] and step <= row["step"] for later, step in first.items())]
    return sorted(kept, key=lambda row: int(row["step"]))


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows that can be read; lines that a kill cut off, and damaged ones, are left out."""
    rows, _ = read_lines(path, ("step", "attempt"))
    return [{RENAMED.get(key, key): value for key, value in row.items()} for row in rows]
