"""Read the rows of a run's JSON lines files one at a time. Damaged lines are counted, never an error."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gptoughts.files import parse_json, regular
from gptoughts.run.tracking.metrics import RENAMED

MOST_BYTES_OF_A_LINE = 1 << 22
"""Longer lines count as damaged, so that a file without line ends does not fill the memory."""
BEGINNING = re.compile(rb'\{"step": (\d{1,15}), "attempt": (\d{1,9})[,}]')
"""How the writer of metrics.jsonl begins a row; a row of this form need not be parsed to learn its step."""


def lines(path: Path, notes: Counter[str]) -> Iterator[bytes]:
    """Yield the lines of a file that end with a line feed, in order; none for a missing file. Others are counted in `notes`."""
    try:
        file = regular(path).open("rb")
    except (OSError, ValueError):
        return
    with file:
        while line := file.readline(MOST_BYTES_OF_A_LINE):
            if line.endswith(b"\n"):
                yield line
            elif len(line) < MOST_BYTES_OF_A_LINE:
                # The last line has no end: a run is writing it, or it was cut off. Whole JSON is taken all the same.
                yield line
            else:
                notes["lines that are too long"] += 1
                while (rest := file.readline(MOST_BYTES_OF_A_LINE)) and not rest.endswith(b"\n"):
                    pass


def parsed(line: bytes, notes: Counter[str]) -> dict[str, Any] | None:
    """Return the object of a line under present key names; None for anything else, which is counted in `notes`."""
    if not line.strip():
        return None
    row: Any
    try:
        row = parse_json(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        notes["lines that are cut off or damaged"] += 1
        return None
    if any(old in row for old in RENAMED):
        return {RENAMED.get(str(key), str(key)): value for key, value in row.items()}
    return row


def number(value: Any) -> float | None:
    """Return a JSON number as a float, infinite where it is too large; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def ends_of_attempts(path: Path) -> dict[int, float]:
    """Return, per attempt, the first step that a later attempt of the run made again: its rows count only below that step."""
    first: dict[int, float] = {}
    ignored: Counter[str] = Counter()
    for line in lines(path, ignored):
        match = BEGINNING.match(line)
        place = (float(match[1]), int(match[2])) if match else position(parsed(line, ignored) or {})
        if place is not None:
            step, attempt = place
            first[attempt] = min(first.get(attempt, step), step)
    ends: dict[int, float] = {}
    end = float("inf")
    for attempt in sorted(first, reverse=True):
        ends[attempt] = end
        end = min(end, first[attempt])
    return ends


def position(row: Mapping[str, Any]) -> tuple[float, int] | None:
    """Return step and attempt (1 if it is not given) of a row; None for a row without a step."""
    step, attempt = number(row.get("step")), number(row.get("attempt", 1))
    if step is None or not abs(step) < 1e15:
        return None
    return step, int(attempt) if attempt is not None and abs(attempt) < 1e9 else 1
