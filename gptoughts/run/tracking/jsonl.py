"""metrics.jsonl, system.jsonl and samples.jsonl: append-only rows, from which everything else can be made again. Reports read these."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptoughts.console import LOGGER, redacted
from gptoughts.run.tracking.lines import LineFile, read_lines
from gptoughts.run.tracking.metrics import RENAMED
from gptoughts.run.tracking.sink import RunInfo, Sink

FILE, SYSTEM_FILE, TEXT_FILE = "metrics.jsonl", "system.jsonl", "samples.jsonl"


class Jsonl(Sink):
    """Appends rows with their attempt. Every row is flushed before the next."""

    immediate = True

    def __init__(self) -> None:
        self._run: RunInfo | None = None
        self._files: dict[str, LineFile] = {}

    def start(self, run: RunInfo) -> None:
        """Open metrics.jsonl for appending; the others are made with their first row."""
        self._run = run
        self._open(FILE)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a row of metrics."""
        self._append(FILE, {"step": step}, values)

    def sample(self, index: int, values: Mapping[str, Any]) -> None:
        """Append a sample of the system metrics."""
        self._append(SYSTEM_FILE, {"sample": index}, values)

    def text(self, step: int, name: str, text: str) -> None:
        """Append a generated text."""
        self._append(TEXT_FILE, {"step": step}, {"name": name, "text": text})

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def _append(self, name: str, number: Mapping[str, int], values: Mapping[str, Any]) -> None:
        assert self._run is not None, "start comes first"
        self._open(name).write(json.dumps({**number, "attempt": self._run.attempt, **redacted(values)}))

    def _open(self, name: str) -> LineFile:
        assert self._run is not None, "start comes first"
        if name not in self._files:
            self._files[name] = LineFile(self._run.out / name)
        return self._files[name]


def attempts(path: Path) -> int:
    """Return how many attempts of the run wrote rows to `path`. Lines that are no rows are counted in a note."""
    found, bad = read_lines(path, ("step", "attempt"))
    if bad > 1:  # one is the line that a kill cut off
        LOGGER.warning("%s: %d lines are no rows and are left out", path, bad)
    return max((row["attempt"] for row in found), default=0)


def newest_sample(path: Path) -> int:
    """Return the number of the newest row of a system.jsonl, 0 if there is none."""
    return max((row["sample"] for row in rows(path, "sample")), default=0)


def read(path: Path) -> list[dict[str, Any]]:
    """Return rows in step order. Rows that a later attempt repeated are replaced by its rows; an incomplete last line is dropped.

    Keys of earlier versions are returned under their present names.
    """
    found = rows(path)
    first: dict[int, int] = {}
    for row in found:
        first[row["attempt"]] = min(first.get(row["attempt"], row["step"]), row["step"])
    kept = [row for row in found if not any(later > row["attempt"] and step <= row["step"] for later, step in first.items())]
    return sorted(kept, key=lambda row: int(row["step"]))


def rows(path: Path, number: str = "step") -> list[dict[str, Any]]:
    """Return all rows of a file, of all attempts in the order written; none if there is no file.

    Lines that a kill cut off, and damaged ones, are left out. `number` is the key that numbers the rows.
    """
    found, _ = read_lines(path, (number, "attempt"))
    return [{RENAMED.get(key, key): value for key, value in row.items()} for row in found]


def replay(run: RunInfo, sink: Sink) -> None:
    """Send `sink` what earlier attempts recorded and this one does not repeat."""
    for row in read(run.out / FILE):
        if row["step"] <= run.step and row["attempt"] < run.attempt:
            sink.log(row["step"], {key: value for key, value in row.items() if key not in ("step", "attempt")})
    for row in rows(run.out / SYSTEM_FILE, "sample"):
        if row["attempt"] < run.attempt:
            sink.sample(row["sample"], {key: value for key, value in row.items() if key not in ("sample", "attempt")})
    for row in read(run.out / TEXT_FILE):
        if row["step"] <= run.step and row["attempt"] < run.attempt:
            sink.text(row["step"], row["name"], row["text"])
