"""Frozen projections in the 16-bit type of their checkpoint, half their float32 memory, with the results of float32 weights.

A product casts its weight to the type of its input, exactly where float32 weights would be cast too. Only the 16-bit weight is saved for
the backward, so no cast copy of a frozen weight outlives its product.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALF_TYPES = (torch.bfloat16, torch.float16)


class _CastLinear(torch.autograd.Function):
    """x W^T + b with a gradient for x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        return gradient @ weight.to(gradient.dtype), None, None


class FrozenLinear(nn.Linear):
    """Frozen projection with a 16-bit weight."""

    def __init__(self, old: nn.Linear, dtype: torch.dtype) -> None:
        """Take the place of `old`, which is on meta."""
        nn.Module.__init__(self)  # nn.Linear's would allocate a weight
        self.in_features, self.out_features = old.in_features, old.out_features
        self.weight = nn.Parameter(torch.empty_like(old.weight, dtype=dtype), requires_grad=False)
        self.bias = old.bias

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return _CastLinear.apply(x.to(dtype), self.weight, self.bias)


def hold(model: nn.Module, names: Iterable[str], dtype: torch.dtype) -> None:
    """Replace each named projection of a model on meta by a FrozenLinear; transformers' Conv1D stays."""
    for name in names:
        old = model.get_submodule(name)
        if type(old) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, FrozenLinear(old, dtype))


def widen(model: nn.Module) -> None:
    """Give every FrozenLinear of a model on meta a float32 weight again, for engines that take no other type."""
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            module.weight = nn.Parameter(torch.empty_like(module.weight, dtype=torch.float32), requires_grad=False)
