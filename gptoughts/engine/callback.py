"""The base class of callbacks: code that runs between training steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptoughts.engine.engine import Engine
from gptoughts.engine.progress import Progress, StepStats


class Callback:
    """Code that runs between training steps. Every method has a default that does nothing; override what you need.

    Callbacks run on every rank. Tensors in `stats` are on the device: reading one waits for it.
    """

    touches_weights = False
    """Whether it reads the model: the trainer then waits for the device first, and switches back to training mode afterwards."""
    phase = "callback"
    """What the failure watch of several ranks calls the time in `on_step`."""
    on_stop = False
    """Whether it also runs when a signal ends the run, where only seconds may be left."""

    def on_start(self, engine: Engine, progress: Progress) -> None:
        """Run once before the first step of this process."""

    def due(self, step: int, last: bool) -> bool:
        """Return whether `on_step` runs after update `step`; `last` marks the last step of the run."""
        return True

    def on_step(self, engine: Engine, progress: Progress, stats: StepStats, last: bool) -> None:
        """Run after a step for which `due` returned true."""

    def on_log(self, step: int, values: Mapping[str, Any]) -> None:
        """Run for every row of metrics, on the first rank; keys as in metrics.jsonl."""

    def on_end(self, engine: Engine, progress: Progress) -> None:
        """Run once after the last step, also after a stop by a signal."""
