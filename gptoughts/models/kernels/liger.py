"""Replace norms, rotary embeddings and MLPs by Liger-Kernel's equivalent Triton kernels. The only file that imports liger_kernel.

Parameters and their names do not change, and no other library is monkeypatched.
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
from gptoughts.models.kernels.liger_places import PATCHED, ROTARY, Part, Place, places
from gptoughts.models.patching import Undo, reroute

OPERATORS: dict[Part, tuple[str, ...]] = {
    "norm": ("LigerRMSNormFunction",),
    "rope": ("LigerRopeFunction",),
    "mlp": ("LigerSiLUMulFunction", "LigerFusedGateUpSiLUMulFunction"),
}
"""Profiler names of each part's forward."""


def install(model: nn.Module, parts: Iterable[Part]) -> list[Undo]:
    """Patch every matching module with Liger's kernels. Returns the undos. Raises LayerError if none matches or the package is broken."""
    found, left = places(model, parts)
    if not found:
        similar = f" (similar, but different: {', '.join(left[:3])})" if left else ""
        raise LayerError(
            f"kernels=liger: no module of this model matches Liger's kernels{similar}", fix="--layer.kernels torch-kernels"
        )
    patches: dict[Part, Callable[[Place], Undo]] = {"norm": _patch_norm, "rope": _patch_rope, "mlp": _patch_mlp}
    return [patches[place.part](place) for place in found]


# --- patches


def _patch_norm(place: Place) -> Undo:
    module, function = place.module, kernels().norm
    # Not in place: in-place backward overwrites the incoming gradient, which another branch may still need.
    arguments = (place.epsilon, place.offset, place.casts, False, None)
    rest = arguments[: _arity(function) - 2]  # older versions lack the last one

    def forward(hidden: Tensor) -> Tensor:
        return function.apply(hidden, module.weight, *rest)

    return reroute(module, _marked(forward))


def _patch_mlp(place: Place) -> Undo:
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
        if both is not None:  # reads both halves without copies; needs 2D input, because its gradient is 2D
            return module.down(both.apply(projected.flatten(0, -2)).unflatten(0, hidden.shape[:-1]))
        return module.down(gated.apply(*projected.chunk(2, dim=-1)))

    return forward


def _patch_rope(place: Place) -> Undo:
    module, function = place.module, kernels().rope
    if isinstance(module, Attention):
        before = module.rotate

        def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            """Convert tables from T D/2 or B 1 T D/2 to the kernel's 1 T D or B T D."""
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
    """Return a copy of `forward` with its own globals, where the rotary function is replaced; the original does not change.

    Decorators, with which transformers renames arguments, are copied around the copy.
    """
    decorated = forward.__dict__.get("__wrapped__")
    if decorated is not None:
        return _copied(forward, forward.__globals__, {decorated: _with_rotary(decorated, function)})

    def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return function.apply(query, key, cos, sin)

    # Without __name__: torch.compile would look up globals in the module of that name and find the original function.
    scope = {name: value for name, value in forward.__globals__.items() if name != "__name__"}
    return _copied(forward, {**scope, ROTARY: rotary}, {})


def _copied(function: types.FunctionType, scope: dict[str, Any], enclosed: dict[Any, Any]) -> types.FunctionType:
    """Return a copy of a function with the globals `scope`, and with the functions `enclosed` replaced in its closure."""
    contents = [cell.cell_contents for cell in function.__closure__ or ()]
    cells = tuple(types.CellType(next((new for old, new in enclosed.items() if old is one), one)) for one in contents)
    copied = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells or None)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _marked(function: Any) -> Any:
    setattr(function, PATCHED, True)
    return function


# --- the package


@dataclass(frozen=True)
class Kernels:
    """Liger's autograd functions. `gated_both` takes gate and up in one tensor; None in older versions."""

    norm: Any
    rope: Any
    gated: Any
    gated_both: Any = None


@cache
def kernels() -> Kernels:
    """Import the package's functions. Raises LayerError with the import error of a broken package."""
    try:
        from liger_kernel.ops import rms_norm, rope, swiglu
    except Exception as error:  # an incompatible Triton may raise any type
        problem = f"kernels=liger: liger_kernel is installed, but the import fails: {type(error).__name__}: {error}"
        raise LayerError(problem) from error
    both = getattr(swiglu, "LigerFusedGateUpSiLUMulFunction", None)
    return Kernels(rms_norm.LigerRMSNormFunction, rope.LigerRopeFunction, swiglu.LigerSiLUMulFunction, both)


def fused_linear_cross_entropy() -> Callable[[Tensor, Tensor, Tensor, str], Tensor]:
    """Return loss(hidden N C, weight V C, labels N, "sum" or "none") -> the sum, or one loss per label, in float32; -100 is ignored."""
    try:
        from liger_kernel.ops import fused_linear_cross_entropy as ops
    except Exception as error:  # as above
        raise LayerError(f"loss=fused-ce: liger_kernel: the import fails: {type(error).__name__}: {error}") from error

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
        if (
            reduction == "none"
            and "token_grad_output" not in inspect.signature(ops.fused_linear_cross_entropy_forward).parameters
        ):
            problem = "loss=fused-ce: this version of liger_kernel has no gradient per row"
            raise LayerError(problem, fix="--layer.loss.implementation sliced")
        options = (None, None, -100, 0.0, 0.0, reduction, None, False, torch.float32)  # weight gradient accumulated in float32
        result: Tensor = ops.LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels, *options)[0]
        return result

    return loss


def _arity(function: Any) -> int:
    """Return the number of arguments of an autograd function's forward, without its context."""
    return len(inspect.signature(function.forward).parameters) - 1
