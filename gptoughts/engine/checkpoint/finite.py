"""Find values that are not finite, in the weights and optimizer state of an engine and in those of a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptoughts.engine.checkpoint.parts import TensorFiles
from gptoughts.engine.distributed.shards import local
from gptoughts.engine.engine import Engine

PLAIN = (Tensor, nn.Parameter)
"""Types that are tested. Low-precision subclasses hold codes and scales in their own ways."""


def not_finite(engine: Engine) -> list[str]:
    """Return the names of weights and optimizer values that are not finite on this rank. The host waits once per device."""
    named = [(name, parameter.detach()) for name, parameter in engine.bare.named_parameters()]
    if engine.optimizer is not None:
        names = {id(parameter): name for name, parameter in engine.bare.named_parameters()}
        for parameter, values in engine.optimizer.state.items():
            held = [(key, value) for key, value in values.items() if isinstance(value, Tensor)]
            named += [(f"{names.get(id(parameter), 'parameter')}/{key}", value) for key, value in held]
    extremes: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, value in named:
        mine = local(value)
        if type(mine) in PLAIN and mine.is_floating_point() and mine.element_size() > 1 and mine.numel():
            extremes.setdefault(mine.device, []).append((name, torch.stack(torch.aminmax(mine.detach())).double()))
    return [name for values in extremes.values() for name in _named_not_finite(values)]


def _named_not_finite(extremes: Iterable[tuple[str, Tensor]]) -> list[str]:
    names, values = zip(*extremes, strict=True)
    finite = torch.isfinite(torch.stack(values)).all(1).tolist()
    return [name for name, good in zip(names, finite, strict=True) if not good]


def not_finite_in(folder: Path, state: Any) -> str:
    """Return the first saved weight or optimizer value that is not finite, an empty string if there is none.

    Buffers may be infinite, as masks are, but not NaN. `state` is the checkpoint's state.json; the oldest name no buffers.
    """
    buffers = state.get("buffers") if isinstance(state, dict) else None
    for stem in ("model", "optimizer"):
        if not any(folder.glob(f"{stem}*.safetensors")):
            continue
        files = TensorFiles(folder, stem)
        for name in files.names():
            if any(_is_bad(stem, name, part, buffers) for part in files.parts(name)):
                return f"{stem}: {name} is not finite"
    return ""


def not_finite_of(tensors: Mapping[str, Mapping[str, Tensor]], buffers: Collection[str]) -> str:
    """Return what `not_finite_in` would return for a checkpoint of these tensors: file stem -> name -> tensor."""
    for stem in ("model", "optimizer"):
        for name, tensor in tensors.get(stem, {}).items():
            if _is_bad(stem, name, tensor, buffers):
                return f"{stem}: {name} is not finite"
    return ""


def _is_bad(stem: str, name: str, part: Tensor, buffers: Collection[str] | None) -> bool:
    if not part.is_floating_point() or part.element_size() == 1 or not part.numel():
        return False
    low, high = torch.aminmax(part)
    may_be_infinite = stem == "model" and (buffers is None or name in buffers)
    return bool(low.isnan()) or not (may_be_infinite or bool(low.isfinite() and high.isfinite()))
