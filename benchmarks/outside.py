"""Measure framework overhead: the time of a step spent outside the engine's methods."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

from gptoughts.config.loader import Recipe
from gptoughts.engine.callback import Callback
from gptoughts.engine.engine import Engine
from gptoughts.engine.objectives.base import Objective, WrappedObjective
from gptoughts.engine.trainer import Progress, StepStats, train
from gptoughts.planning.layer import Choice
from gptoughts.planning.resolve import Plan

WARM, STEPS = 10, 500
METHODS = ("next_batch", "backward", "clip", "step")

EngineFactory = Callable[[Recipe, Plan], AbstractContextManager[Engine]]
Rate = Callable[[Progress], float]


class _Clock:
    """Accumulated seconds of the wrapped functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds += perf_counter() - began

        return timed


class _TimedObjective(WrappedObjective):
    """An objective with a timed forward."""

    def __init__(self, objective: Objective, clock: _Clock) -> None:
        super().__init__(objective)
        self._forward = clock.around(objective)

    def __call__(self, model: Any, batch: Any) -> Any:
        return self._forward(model, batch)


def put_clock_on(engine: Engine) -> _Clock:
    """Time the forward and the METHODS of `engine`; contexts, weights and counters stay outside."""
    clock = _Clock()
    for name in METHODS:
        setattr(engine, name, clock.around(getattr(engine, name)))
    engine.objective = _TimedObjective(engine.objective, clock)
    return clock


def outside_verbs(build: EngineFactory, recipe: Recipe, plan: Plan, rate: Rate, micro_batch: int | None) -> dict[str, Any]:
    """Measure seconds per step outside the engine over 500 steps of a tiny model with the plan's layers and micro-batches.

    Overhead does not grow with the model. Blocks are not compiled: compilation only affects the forward.
    """
    small = {"depth": 1, "width": 64, "heads": 1, "kv_heads": None, "hidden": 64}
    tiny = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update=small),
            "data": recipe.data.model_copy(update={"sequence_length": 16}),
        }
    )
    uncompiled = tuple(
        Choice("compile", "eager", {}, "bench") if choice.slot == "compile" else choice for choice in plan.choices
    )
    with build(tiny, replace(plan, choices=uncompiled)) as engine:
        engine.micro_batch = micro_batch
        laps = _Laps(put_clock_on(engine))
        train(engine, Progress(), lambda now: now.step >= WARM + STEPS, rate, callbacks=[laps])
    outside = laps.outside[-STEPS:]
    return {"steps": STEPS, "seconds_per_step": median(outside), "mean_seconds_per_step": sum(outside) / STEPS}


class _Laps(Callback):
    """A callback that records seconds outside the engine per step. The median is used: other programs interrupt single steps."""

    on_stop = True

    def __init__(self, clock: _Clock) -> None:
        self._clock, self._inside, self._began = clock, 0.0, perf_counter()
        self.outside: list[float] = []

    def on_step(self, engine: Engine, progress: Progress, stats: StepStats, last: bool) -> None:
        """Record this step's time outside the engine."""
        now = perf_counter()
        self.outside.append(now - self._began - (self._clock.seconds - self._inside))
        self._began, self._inside = now, self._clock.seconds
