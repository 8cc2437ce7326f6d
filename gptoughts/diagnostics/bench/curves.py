"""Smooth and compare loss curves."""

from __future__ import annotations

import math
from collections.abc import Sequence


def window_of(steps: int) -> int:
    """Return the smoothing window: a tenth of all steps, at least one."""
    return max(1, steps // 10)


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """Return the trailing mean over `window` values (fewer at the start)."""
    starts = [max(0, end - window) for end in range(1, len(losses) + 1)]
    return [math.fsum(losses[first:end]) / (end - first) for end, first in enumerate(starts, 1)]


def mean_difference(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return the mean relative distance of two smoothed curves over their common steps; None if a value is not finite."""
    steps = min(len(one), len(other))
    if not steps or not all(map(math.isfinite, [*one[:steps], *other[:steps]])):
        return None
    window = window_of(steps)
    pairs = zip(smoothed(one[:steps], window), smoothed(other[:steps], window), strict=True)
    return math.fsum(abs(first - second) / abs(second) for first, second in pairs if second) / steps


def first_below(curve: Sequence[float], level: float) -> int | None:
    """Return the first step, from 1, with the curve at or below `level`; None if there is none."""
    return next((place for place, value in enumerate(curve, 1) if value <= level), None)
