"""No garbage collection during training: objects alive after the first update are frozen, and the collector is disabled.

A collection traverses every Python object to find reference cycles; a training step creates none. It hurts where your own code creates
cycles that hold tensors: they are never freed.
Source: karpathy/nanochat, scripts/base_train.py; Python's documentation of the module gc.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from gptoughts.planning.layer import Case, Engine, Evidence, Layer, Options, Reason, StepTrace, active, inactive, unsupported


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """At least two steps: it takes effect after the first update."""
    if case.recipe.train.steps == 1:
        yield unsupported("needs at least 2 steps: it takes effect after the first", remedy="--train.steps 2")


class Collections:
    """Counter of collections, for `gc.callbacks`."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, phase: str, info: dict[str, Any]) -> None:
        self.count += phase == "start"


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Wrap `step`: after the first update, freeze live objects and disable the collector."""
    collections, was_enabled = Collections(), gc.isenabled()

    def step_and_freeze(step: Callable[[], bool]) -> bool:
        updated = step()
        if updated and collections not in gc.callbacks:
            gc.collect()
            gc.freeze()
            gc.disable()
            gc.callbacks.append(collections)
        return updated

    undo = engine.wrap("step", step_and_freeze)
    try:
        yield
    finally:
        undo()
        if collections in gc.callbacks:
            gc.callbacks.remove(collections)
            gc.unfreeze()
        if was_enabled:
            gc.enable()


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require a disabled collector, frozen objects, and no collection since the first update."""
    counter = next((one for one in gc.callbacks if isinstance(one, Collections)), None)
    if gc.isenabled() or counter is None or gc.get_freeze_count() == 0:
        return inactive(f"the collector is {'on' if gc.isenabled() else 'off'}, {gc.get_freeze_count()} objects frozen")
    if counter.count:
        return inactive(f"{counter.count} collections since the first update", collections=counter.count)
    return active(f"no collection since the first update, {gc.get_freeze_count()} objects frozen", collections=0)


LAYER = Layer(
    name="gc-freeze",
    slot="host",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    unmet=unmet,
    wraps=("step",),
    warmup_steps=1,
)

CONTROL = replace(LAYER, name="gc-control", apply=lambda engine, options: nullcontext())
"""Negative control: the same layer without its effect; `verify` must return inactive."""

LAYERS = [LAYER, CONTROL]
