"""Length of a run, in steps or hours, and the learning rate of each step."""

from __future__ import annotations

import math

from gptoughts.config.loader import Recipe
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.optim.lr_schedule import learning_rate
from gptoughts.engine.trainer import Progress


class RunLength:
    """Length of a run. `steps` is None where the recipe counts hours; ranks then agree on the time, since clocks differ.

    samples  number of samples per epoch
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, samples: int) -> None:
        self._recipe, self._ranks, self._samples = recipe, ranks, samples
        self.steps = _steps(recipe, samples)
        self._limit_seconds = (recipe.train.hours or 0.0) * 3600

    def finished(self, progress: Progress) -> bool:
        """Return whether the run has reached its length."""
        if self.steps is not None:
            return progress.step >= self.steps
        return self._ranks.any(progress.seconds >= self._limit_seconds)

    def rate(self, progress: Progress) -> float:
        """Return the learning rate of the next update. The last update has the schedule's last rate."""
        optim = self._recipe.optim
        if self.steps is not None:
            last = max(1, self.steps - 1)
            return learning_rate(optim, progress.step, progress.step / last, min(1.0, optim.warmup_steps / last))
        seconds = float(self._ranks.sum(progress.seconds)) / self._ranks.size
        return learning_rate(optim, progress.step, seconds / self._limit_seconds)

    def seconds_left(self, progress: Progress, seconds_per_step: float | None) -> float | None:
        """Return the seconds of training left at `seconds_per_step`; None where that is needed and unknown."""
        if self.steps is None:
            return max(0.0, self._limit_seconds - progress.seconds)
        return None if seconds_per_step is None else seconds_per_step * (self.steps - progress.step)

    def epoch(self, progress: Progress) -> float | None:
        """Return the epochs consumed so far; None where the number of samples is unknown."""
        per_epoch = self._samples * self._recipe.data.sequence_length
        return progress.tokens / per_epoch if per_epoch else None


def _steps(recipe: Recipe, samples: int) -> int | None:
    length, per_step, sequence_length = recipe.train, recipe.train.global_batch, recipe.data.sequence_length
    if length.tokens is not None:
        return math.ceil(length.tokens / (per_step * sequence_length))
    if length.epochs is not None:
        return max(1, math.ceil(length.epochs * samples / per_step))
    return length.steps
