"""Frozen projections in four bits (NF4), an eighth of their float32 memory: the base of QLoRA.

A block of 64 values is stored as indices of 16 quantiles of the normal distribution, times the block's largest magnitude: 4.5 bits
per value (Dettmers et al. 2023, without their second quantization of the magnitudes, which saves 0.37 bits). Each matmul unpacks its
weight in forward and again in backward, which costs time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gptoughts.errors import ConfigError, LayerError

BLOCK = 64
"""Values that share one magnitude."""
PARTS = ("packed", "absmax")
"""Parameters of an NF4Linear that replace its weight."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the import warning of bitsandbytes: on a CPU, that a kernel which we do not use is not installed."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def bitsandbytes_package() -> Any:
    """Import bitsandbytes. Raises LayerError if it is missing or broken."""
    try:
        with quiet():
            import bitsandbytes
    except ModuleNotFoundError as error:
        if error.name != "bitsandbytes":
            raise LayerError(f"bitsandbytes: bitsandbytes is installed, but the import fails: {error}") from error
        raise LayerError("bitsandbytes: package not installed", fix="pip install bitsandbytes") from None
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise LayerError(
            f"bitsandbytes: bitsandbytes is installed, but the import fails: {type(error).__name__}: {error}"
        ) from error
    return bitsandbytes


def _kernels() -> Any:
    """Return the operators of bitsandbytes, for CPU and GPU. Raises ConfigError if the package is missing or broken."""
    try:
        bitsandbytes_package()  # registers its operators with torch
    except LayerError as error:
        reason = error.args[0].splitlines()[0].removesuffix(".")
        fix = "pip install bitsandbytes, or --adapter.base full"
        raise ConfigError(f"adapter.base: {reason}", found="nf4", fix=fix) from error
    return torch.ops.bitsandbytes


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight on its device. Returns (packed values, two per byte; largest magnitude of each 64)."""
    packed, absmax = _kernels().quantize_4bit.default(weight.float().contiguous(), BLOCK, "nf4", torch.uint8)
    return packed, absmax


def unpack(packed: Tensor, absmax: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Dequantize a packed weight to `dtype`."""
    # As one row: bitsandbytes 0.50's CPU kernel uses wrong magnitudes for rows of 48 or 96, which end inside a block.
    flat = (1, shape[0] * shape[1])
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, BLOCK, "nf4", flat, dtype)
    return weight.view(shape)


class _PackedLinear(torch.autograd.Function):
    """x W^T + b with a gradient for x only. Saves the packed weight for backward; F.linear would save the unpacked one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed, absmax)
        ctx.shape = shape
        return F.linear(x, unpack(packed, absmax, shape, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        packed, absmax = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ unpack(packed, absmax, ctx.shape, gradient.dtype), None, None, None, None


class NF4Linear(nn.Linear):
    """Frozen projection with a packed weight, which the property `weight` unpacks.

    `transposed`: the original weight is in x out (transformers' Conv1D). The packed one is always out x in.
    """

    def __init__(self, out_features: int, in_features: int, bias: nn.Parameter | None, transposed: bool, name: str) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate the weight
        _kernels()
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        values = in_features * out_features
        if values % 2:
            raise ConfigError(
                f"adapter.base: nf4 needs an even number of weights in {name}", found=values, fix="--adapter.base full"
            )
        self.packed = nn.Parameter(torch.empty(values // 2, 1, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.absmax = nn.Parameter(torch.empty(-(-values // BLOCK), device="meta"), requires_grad=False)
        self.bias = bias  # type: ignore[assignment]  # may be None, as in nn.Linear

    @property
    def shape(self) -> tuple[int, int]:
        """Return the weight's shape, out x in."""
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Return the unpacked weight, out x in, float32."""
        return unpack(self.packed, self.absmax, self.shape, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return _PackedLinear.apply(x.to(dtype), self.packed, self.absmax, self.bias, self.shape)


def is_turned(module: nn.Module) -> bool:
    """Return whether a projection's original weight is in x out, as in transformers' Conv1D."""
    return type(module).__name__ == "Conv1D" or getattr(module, "transposed", False)


def quantize(model: nn.Module, names: Iterable[str]) -> None:
    """Replace each named projection of a model on meta by an NF4Linear without values."""
    for name in names:
        old = model.get_submodule(name)
        bias = getattr(old, "bias", None)
        shape: Any = old.weight.shape
        outer, inner = reversed(shape) if is_turned(old) else shape
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, NF4Linear(outer, inner, bias, is_turned(old), name))
