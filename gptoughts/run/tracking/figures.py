"""Split a row of metrics into numbers, which trackers draw, and texts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def numbers_and_texts(values: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Return the numbers and the texts of a row. None is left out; a list of numbers gets a key per entry, another list its length."""
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, str):
            texts[key] = value
        elif isinstance(value, int | float):
            numbers[key] = value
        elif isinstance(value, list | tuple):
            if value and all(isinstance(one, int | float) for one in value):
                numbers |= {f"{key}/{place}": one for place, one in enumerate(value)}
            else:
                numbers[key] = len(value)
    return {key: value for key, value in numbers.items() if math.isfinite(value)}, texts
