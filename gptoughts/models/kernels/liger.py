"""Liger-Kernel's Triton kernels in the places of a model where they compute the same. The one file that imports liger_kernel.

Parameters stay the model's own, under their names; nothing of another library is rebound.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from gptoughts.errors import LayerError
from gptoughts.models.gpt.gpt import Attention, SwiGLU
from gptoughts.models.kernels.liger_places import ROTARY, TAKEN, Part, Place, places
from gptoughts.models.patching import Undo, reroute

OPERATORS: dict[Part, tuple[str, ...]] = {
    "norm": ("LigerRMSNormFunction",),
    "rope": ("LigerRopeFunction",),
    "mlp": ("LigerSiLUMulFunction", "LigerFusedGateUpSiLUMulFunction"),
}
"""What torch's profiler calls the forward of each part."""


def install(model: nn.Module, parts: Iterable[Part]) -> list[Undo]:
    """Put Liger's kernels into every place. Returns the undos. Raises LayerError where there is no place, or the package is broken."""
    found, left = places(model, parts)
    if not found:
        what = f"; left as they are: {', '.join(left[:3])}" if left else ""
        raise LayerError(f"kernels=liger: no module of this model computes what Liger's kernels compute{what}")
    put: dict[Part, Callable[[Place], Undo]] = {"norm": _put_norm, "rope": _put_rope, "mlp": _put_mlp}
    return [put[place.part](place) for place in found]


# --- what takes its place


def _put_norm(place: Place) -> Undo:
    module, function = place.module, kernels().norm
    # Not in place: that would write into the gradient it is given, which another branch may still want.
    words = (place.epsilon, place.offset, place.casts, False, None)
    rest = words[: _takes(function) - 2]  # the last came with a later version

    def forward(hidden: Tensor) -> Tensor:
        return function.apply(hidden, module.weight, *rest)

    return reroute(module, _marked(forward))


def _put_mlp(place: Place) -> Undo:
    module: Any = place.module
    if isinstance(module, SwiGLU):
        return reroute(module, _marked(_native_mlp(module)))
    gated = kernels().gated

    def forward(hidden: Tensor) -> Tensor:
        return module.down_proj(gated.apply(module.gate_proj(hidden), module.up_proj(hidden)))

    return reroute(module, _marked(forward))


def _native_mlp(module: SwiGLU) -> Callable[[Tensor], Tensor]:
    gated, both = kernels().gated, kernels().gated_both

    def forward(hidden: Tensor) -> Tensor:
        projected = module.gate_up(hidden)
        if both is not None:  # reads both halves where they stand; its gradient has the form of rows, so it is given rows
            return module.down(both.apply(projected.flatten(0, -2)).unflatten(0, hidden.shape[:-1]))
        return module.down(gated.apply(*projected.chunk(2, dim=-1)))

    return forward


def _put_rope(place: Place) -> Undo:
    module, function = place.module, kernels().rope
    if isinstance(module, Attention):
        before = module.rotate

        def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            """Tables T D/2, or B 1 T D/2; the kernel wants them 1 T D or B T D."""
            tables = [torch.cat((table, table), dim=-1) for table in (cos, sin)]
            tables = [table[None] if table.dim() == 2 else table[:, 0] for table in tables]
            return function.apply(query, key, *tables)

        module.rotate = _marked(rotate)

        def undo() -> None:
            module.rotate = before

        return undo
    forward = type(module).forward
    assert isinstance(forward, types.FunctionType)
    return reroute(module, types.MethodType(_marked(_with_rotary(forward, function)), module))


def _with_rotary(forward: types.FunctionType, function: Any) -> types.FunctionType:
    """`forward` as it is written, looking up another rotary function: a copy with globals of its own, so that nobody else's change."""

    def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return function.apply(query, key, cos, sin)

    # Without the module's name: torch.compile would look globals up in the module of that name, and find the old function.
    scope = {name: value for name, value in forward.__globals__.items() if name != "__name__"}
    scope[ROTARY] = rotary
    made = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _marked(function: Any) -> Any:
    setattr(function, TAKEN, True)
    return function


# --- the package


@dataclass(frozen=True)
class Kernels:
    """Liger's autograd functions. `gated_both` takes gate and up in one tensor; versions before it have None."""

    norm: Any
    rope: Any
    gated: Any
    gated_both: Any = None


@cache
def kernels() -> Kernels:
    """The package's functions. Raises LayerError quoting it where it is installed and broken."""
    try:
        from liger_kernel.ops import rms_norm, rope, swiglu
    except Exception as error:  # a Triton that does not fit raises whatever it likes
        raise LayerError(
            f"kernels=liger: liger_kernel is installed and does not import: {type(error).__name__}: {error}"
        ) from error
    both = getattr(swiglu, "LigerFusedGateUpSiLUMulFunction", None)
    return Kernels(rms_norm.LigerRMSNormFunction, rope.LigerRopeFunction, swiglu.LigerSiLUMulFunction, both)


def fused_linear_cross_entropy() -> Callable[[Tensor, Tensor, Tensor, str], Tensor]:
    """loss(hidden N C, weight V C, labels N, "sum" or "none") -> a sum, or one loss per label, in float32; -100 is ignored."""
    try:
        from liger_kernel.ops import fused_linear_cross_entropy as ops
    except Exception as error:  # as above
        raise LayerError(f"loss=fused-ce: liger_kernel does not import: {type(error).__name__}: {error}") from error

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
        if (
            reduction == "none"
            and "token_grad_output" not in inspect.signature(ops.fused_linear_cross_entropy_forward).parameters
        ):
            raise LayerError(
                "loss=fused-ce: this liger_kernel weighs no single rows\n  try: --layer.loss.implementation sliced"
            )
        wanted = (None, None, -100, 0.0, 0.0, reduction, None, False, torch.float32)  # sums of the weight's gradient in float32
        result: Tensor = ops.LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels, *wanted)[0]
        return result

    return loss


def _takes(function: Any) -> int:
    """How many arguments an autograd function's forward takes behind its context."""
    return len(inspect.signature(function.forward).parameters) - 1
