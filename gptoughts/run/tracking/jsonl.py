"""metrics.jsonl: one row per logged step, append-only. The source that every report reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


class Jsonl:
    """Appends rows, each with its step and the attempt of the run that wrote it; every row is on disk before the next."""

    def __init__(self, path: Path, attempt: int) -> None:
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._attempt = attempt
        if torn:  # a kill left half a row; the next must not be written behind it
            self._file.write("\n")

    def log(self, step: int, values: Row) -> None:
        """Write one row."""
        self._file.write(json.dumps({"step": step, "attempt": self._attempt, **values}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def attempts(path: Path) -> int:
    """How many times the run was started before."""
    return max((int(row["attempt"]) for row in _rows(path)), default=0)


def read(path: Path) -> list[dict[str, Any]]:
    """Rows in order of steps. What a later attempt went over again counts as that attempt says; a torn last line is left out."""
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
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the line that a kill tore
    return rows
