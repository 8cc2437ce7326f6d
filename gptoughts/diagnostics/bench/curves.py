"""Curves of a loss: smoothed, compared, and when one reaches what another ended with."""

from __future__ import annotations

import math
from collections.abc import Sequence


def window_of(steps: int) -> int:
    """Steps that a loss is smoothed over: a tenth of all, at least one."""
    return max(1, steps // 10)


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the `window` - 1 before it; of as many as there are at the beginning."""
    starts = [max(0, end - window) for end in range(1, len(losses) + 1)]
    return [math.fsum(losses[first:end]) / (end - first) for end, first in enumerate(starts, 1)]


def mean_difference(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Mean distance of two smoothed curves over the steps that both have, as a share of the second; None where a value is not finite."""
    steps = min(len(one), len(other))
    if not steps or not all(map(math.isfinite, [*one[:steps], *other[:steps]])):
        return None
    window = window_of(steps)
    pairs = zip(smoothed(one[:steps], window), smoothed(other[:steps], window), strict=True)
    return math.fsum(abs(first - second) / abs(second) for first, second in pairs if second) / steps


def first_below(curve: Sequence[float], level: float) -> int | None:
    """The number of steps, from 1, after which the curve is at `level` or below for the first time; None where it never is."""
    return next((place for place, value in enumerate(curve, 1) if value <= level), None)
