"""How long a step of our loop spends outside the engine's verbs: what the house itself costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from gptoughts.engine.engine import Engine
from gptoughts.engine.objectives.base import Objective, WrappedObjective
from gptoughts.engine.trainer import Progress, StepStats, train
from gptoughts.planning.layer import Choice

if TYPE_CHECKING:
    from gptoughts.diagnostics.bench.step import Subject
    from gptoughts.planning.resolve import Plan

WARM, STEPS = 10, 500
VERBS = ("next_batch", "backward", "clip", "step")


class _Clock:
    """Seconds spent inside what it was put around."""

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
    """An objective whose forward runs under a clock."""

    def __init__(self, objective: Objective, clock: _Clock) -> None:
        super().__init__(objective)
        self._forward = clock.around(objective)

    def __call__(self, model: Any, batch: Any) -> Any:
        return self._forward(model, batch)


def put_clock_on(engine: Engine) -> _Clock:
    """Time the forward and every verb of `engine`; contexts, weights and counters stay outside."""
    clock = _Clock()
    for verb in VERBS:
        setattr(engine, verb, clock.around(getattr(engine, verb)))
    engine.objective = _TimedObjective(engine.objective, clock)
    return clock


def outside_verbs(subject: Subject, plan: Plan, micro_batch: int | None) -> dict[str, Any]:
    """Seconds per step outside the verbs, over 500 steps of a tiny model with the plan's layers and as many micro-batches.

    They do not grow with the model, so a tiny one tells them sooner. Its blocks are not compiled: that lies inside the forward.
    """
    recipe = subject.recipe
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
    with subject.engine(tiny, replace(plan, choices=uncompiled)) as engine:
        engine.micro_batch = micro_batch
        laps = _Laps(put_clock_on(engine))
        train(engine, Progress(), lambda now: now.step >= WARM + STEPS, subject.length.rate, [laps])
    outside = laps.outside[-STEPS:]
    return {"steps": STEPS, "seconds_per_step": median(outside), "mean_seconds_per_step": sum(outside) / STEPS}


class _Laps:
    """A callback that splits each step's time. The median of the rest is what counts: other programs interrupt a step now and then."""

    touches_weights = False
    on_stop = True

    def __init__(self, clock: _Clock) -> None:
        self._clock, self._inside, self._began = clock, 0.0, perf_counter()
        self.outside: list[float] = []

    def due(self, step: int, last: bool) -> bool:
        """Each step."""
        return True

    def run(self, engine: Engine, progress: Progress, stats: StepStats, last: bool) -> None:
        """Keep what this step spent outside the verbs."""
        now = perf_counter()
        self.outside.append(now - self._began - (self._clock.seconds - self._inside))
        self._began, self._inside = now, self._clock.seconds
