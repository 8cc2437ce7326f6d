"""No garbage collection while training: everything alive after the first update is set aside, and the collector is switched off.

A collection walks every Python object of the process to find cycles; a training step makes none. It hurts where your own code makes
reference cycles that hold tensors: with the collector off they are never freed.
Idea: karpathy/nanochat, scripts/base_train.py; Python's documentation of the module gc.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from gptoughts.planning.layer import Case, Engine, Evidence, Layer, Options, Reason, StepTrace, active, inactive, unsupported


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """It acts after the first update, so there must be a second."""
    if case.recipe.train.steps == 1:
        yield unsupported("needs a second step: it acts after the first", remedy="--train.steps 2")


class Collections:
    """Counts the collections that Python begins, from the moment when it is put among gc's callbacks."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, phase: str, info: dict[str, Any]) -> None:
        self.count += phase == "start"


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Wrap `step`: once an update was made, set aside what lives and switch the collector off."""
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
    """The collector is off, objects are set aside, and none of the steps since then began a collection."""
    counter = next((one for one in gc.callbacks if isinstance(one, Collections)), None)
    if gc.isenabled() or counter is None or gc.get_freeze_count() == 0:
        return inactive(f"the collector is {'on' if gc.isenabled() else 'off'}, {gc.get_freeze_count()} objects set aside")
    if counter.count:
        return inactive(f"{counter.count} collections since the first update", collections=counter.count)
    return active(f"no collection since the first update, {gc.get_freeze_count()} objects set aside", collections=0)


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
"""The same layer with its work left out: `verify` must say no."""

LAYERS = [LAYER, CONTROL]
