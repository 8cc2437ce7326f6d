"""metrics.jsonl: one row per logged step, append-only. All reports read this file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from gptoughts.run.tracking.metrics import RENAMED
from gptoughts.run.tracking.sink import RunInfo, Sink

FILE = "metrics.jsonl"


class Jsonl(Sink):
    """Appends rows with their step and attempt. Every row is flushed before the next."""

    _file: IO[str] | None = None
    _attempt = 1

    def start(self, run: RunInfo) -> None:
        """Open the file for appending; end a line that a kill left incomplete."""
        path, self._attempt = run.out / FILE, run.attempt
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if torn:
            self._file.write("\n")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one row."""
        assert self._file is not None, "start comes first"
        self._file.write(json.dumps({"step": step, "attempt": self._attempt, **values}) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def attempts(path: Path) -> int:
    """Return how many attempts of the run wrote rows to `path`."""
    return max((int(row["attempt"]) for row in _rows(path)), default=0)


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
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off by a kill
        rows.append({RENAMED.get(key, key): value for key, value in row.items()})
    return rows
