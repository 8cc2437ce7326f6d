"""Find loss spikes: a loss far above the median of the recent ones, in units of their median absolute deviation."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

WINDOW = 50
"""Recent losses that are compared with."""
LEAST = 20
"""Losses that are needed before one is judged."""
DEVIATIONS = 6.0
"""Standard deviations, estimated as 1.4826 median absolute deviations (exact for normal noise), from which on a loss is a spike."""
LEAST_SHARE = 0.05
"""Share of the median that a spike exceeds it by in any case, since the deviation of a converged loss can be close to 0."""


@dataclass
class LossSpikes:
    """Judges losses in the order of their steps. A spike counts once, until the loss is below the limit again."""

    count: int = 0
    """Spikes so far in this attempt."""
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _above: bool = False

    def take(self, step: int, loss: float) -> list[str]:
        """Add the loss of `step`. Returns a line if a spike begins with it."""
        limit, median = self._limit()
        begins = loss > limit and not self._above
        self._above = loss > limit
        self._recent.append(loss)
        if not begins:
            return []
        self.count += 1
        return [f"loss spike: {loss:.4f}, the median of the {len(self._recent) - 1} steps before is {median:.4f}"]

    def _limit(self) -> tuple[float, float]:
        if len(self._recent) < LEAST:
            return float("inf"), float("nan")
        median = statistics.median(self._recent)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in self._recent)
        return median + max(DEVIATIONS * deviation, LEAST_SHARE * abs(median)), median
