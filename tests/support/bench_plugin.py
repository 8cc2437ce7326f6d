"""Layers that bench must notice: one that is never active, one that needs another's slot, one that climbs instead of descending, one that
comes to nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from gptoughts.planning.layer import Engine, Evidence, Layer, Options, StepTrace, active, inactive


@contextmanager
def _climbing(engine: Engine, options: Options) -> Iterator[None]:
    def turned(clip: Callable[[], Any]) -> Any:
        norm = clip()
        for parameter in engine.parameters():
            parameter.grad.neg_()
        return norm

    undo = engine.wrap("clip", turned)
    try:
        yield
    finally:
        undo()


@contextmanager
def _broken(engine: Engine, options: Options) -> Iterator[None]:
    def spoilt(clip: Callable[[], Any]) -> Any:
        norm = clip()
        for parameter in engine.parameters():
            parameter.grad.fill_(float("nan"))
        return norm

    undo = engine.wrap("clip", spoilt)
    try:
        yield
    finally:
        undo()


def _says_no(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    return inactive("does nothing")


def _says_yes(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    return active("seen")


IDLE = Layer(name="idle", slot="matmul", card="Nothing.", apply=lambda engine, options: nullcontext(), verify=_says_no)
LEANING = Layer(
    name="leaning",
    slot="kernels",
    card="Nothing, beside sdpa.",
    apply=lambda engine, options: nullcontext(),
    verify=_says_yes,
    needs_slots={"attention": ("sdpa",)},
)
UPHILL = Layer(
    name="uphill",
    slot="matmul",
    card="Every update goes the wrong way.",
    apply=_climbing,
    verify=_says_yes,
    wraps=("clip",),
    changes_numerics=True,
)
NOWHERE = replace(UPHILL, name="nowhere", card="Every update makes weights that are no numbers.", apply=_broken)
LAYERS = [IDLE, LEANING, UPHILL, NOWHERE]
