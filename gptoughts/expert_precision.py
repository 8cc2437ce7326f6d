"""Experts that follow autocast: transformers' grouped products take their weights' own dtype, and would stay in float32.

`torch.nn.functional.grouped_mm` is not on autocast's list (torch 2.11, 2.13), so with float32 weights the largest products of a
mixture ran in float32 whatever the precision layer said, and under torch.compile, where only bfloat16 is grouped, in a loop over
experts that waits for the device (transformers 5.23) or does not compile at all (5.17).
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from gptoughts.models.experts import stacks
from gptoughts.surgery import Undo, reroute


class _InDtype:
    """A holder of experts whose weights are read in another dtype; everything else is the holder's."""

    def __init__(self, holder: nn.Module, dtype: torch.dtype) -> None:
        self._holder, self._dtype = holder, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._holder, name)
        return value.to(self._dtype) if isinstance(value, nn.Parameter) else value


def _forward(holder: Any, hidden: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
    if not torch.is_autocast_enabled(hidden.device.type):
        return type(holder).forward(holder, hidden, *arguments, **keywords)
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return type(holder).forward(_InDtype(holder, dtype), hidden.to(dtype), *arguments, **keywords)


def follow_autocast(model: nn.Module) -> Undo:
    """Compute the experts of `model` in autocast's dtype where autocast is on. Returns the undo; nothing changes for dense models.

    Weights stay what they are on disk and to the optimiser; they are cast at each forward, as autocast casts those of linear layers.
    """
    undos = [reroute(holder, MethodType(_forward, holder)) for holder in stacks(model).values()]

    def undo() -> None:
        for back in undos:
            back()

    return undo
