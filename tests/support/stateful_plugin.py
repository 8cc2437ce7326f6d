"""A layer that scales gradients by a count of its own, which no checkpoint holds: a resumed run cannot be exact with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gptoughts.planning.layer import Engine, Layer, Options, active


@contextmanager
def _apply(engine: Engine, options: Options) -> Iterator[None]:
    made = 0

    def scaled(clip: Callable[[], Any]) -> Any:
        nonlocal made
        norm = clip()
        made += 1
        for parameter in engine.parameters():
            parameter.grad.mul_(1 + made / 100)
        return norm

    undo = engine.wrap("clip", scaled)
    try:
        yield
    finally:
        undo()


LAYERS = [
    Layer(
        name="counting",
        slot="matmul",
        card="Scales gradients by the number of steps of this process.",
        apply=_apply,
        verify=lambda engine, trace, options: active("seen"),
        wraps=("clip",),
        changes_numerics=True,
    )
]
