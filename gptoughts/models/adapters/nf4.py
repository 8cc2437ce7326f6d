"""Frozen projections in four bits (NF4), an eighth of their float32 memory: the base of QLoRA.

A block of 64 values is stored as 16 quantiles of the normal distribution times the block's largest magnitude, 4.5 bits a value
(Dettmers et al. 2023; their second quantization, of the magnitudes, is left out: 0.37 bits). The weights are whole for the moment
of a product only, and again for its gradient. It hurts in time: every product unpacks its weight first.
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
"""The parameters of an NF4Linear that stand for its weight."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without what bitsandbytes says as it is imported: on a CPU, that a kernel which nothing here calls is not installed."""
    talk = logging.getLogger("bitsandbytes")
    level = talk.level
    talk.setLevel(logging.ERROR)
    try:
        yield
    finally:
        talk.setLevel(level)


def bitsandbytes_package() -> Any:
    """The package, imported. Raises LayerError where it is missing or cannot be imported."""
    try:
        with quiet():
            import bitsandbytes
    except ModuleNotFoundError as error:
        if error.name != "bitsandbytes":
            raise LayerError(f"bitsandbytes is installed and cannot be imported: {error}") from error
        raise LayerError("needs the package bitsandbytes, not installed\n  try: pip install bitsandbytes") from None
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise LayerError(f"bitsandbytes is installed and cannot be imported: {type(error).__name__}: {error}") from error
    return bitsandbytes


def _kernels() -> Any:
    """The operators of bitsandbytes, on a CPU as on a GPU. Raises ConfigError where the package is missing."""
    try:
        bitsandbytes_package()  # brings its operators to torch
    except LayerError as error:
        raise ConfigError(
            f'adapter.base = "nf4": {error.args[0].splitlines()[0]}\n  try: pip install bitsandbytes, or --adapter.base full'
        ) from error
    return torch.ops.bitsandbytes


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(two values a byte, largest magnitude of each 64) of a weight, on its device."""
    packed, absmax = _kernels().quantize_4bit.default(weight.float().contiguous(), BLOCK, "nf4", torch.uint8)
    return packed, absmax


def unpack(packed: Tensor, absmax: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight again, in `dtype`; what `pack` rounded stays rounded."""
    # As one row: bitsandbytes 0.50's CPU kernel reads wrong magnitudes for rows of 48 or 96, whose ends fall inside a block.
    flat = (1, shape[0] * shape[1])
    whole: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(packed, absmax, BLOCK, "nf4", flat, dtype)
    return whole.view(shape)


class _Product(torch.autograd.Function):
    """x W^T + b with a gradient for x alone. Keeps the packed weight for the backward; autograd's own linear would keep the whole."""

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
    """A frozen projection that holds its weight packed. `weight` unpacks it, for whoever asks what it is worth.

    `turned`: the model's own weight is in x out (transformers' Conv1D), here it is out x in.
    """

    def __init__(self, out_features: int, in_features: int, bias: nn.Parameter | None, turned: bool, name: str) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make the weight
        _kernels()
        self.in_features, self.out_features, self.turned = in_features, out_features, turned
        values = in_features * out_features
        if values % 2:
            raise ConfigError(f'adapter.base = "nf4": {name} has {values} weights, and two share a byte; take base = "full"')
        self.packed = nn.Parameter(torch.empty(values // 2, 1, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.absmax = nn.Parameter(torch.empty(-(-values // BLOCK), device="meta"), requires_grad=False)
        self.bias = bias  # type: ignore[assignment]  # None where there is none, as in nn.Linear

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight: out x in."""
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The unpacked weight, out x in, float32."""
        return unpack(self.packed, self.absmax, self.shape, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return _Product.apply(x.to(dtype), self.packed, self.absmax, self.bias, self.shape)


def is_turned(module: nn.Module) -> bool:
    """Whether a projection's own weight is in x out, as in transformers' Conv1D."""
    return type(module).__name__ == "Conv1D" or getattr(module, "turned", False)


def quantize(model: nn.Module, names: Iterable[str]) -> None:
    """Put an NF4Linear without values in the place of each named projection of a model on meta."""
    for name in names:
        old = model.get_submodule(name)
        bias = getattr(old, "bias", None)
        shape: Any = old.weight.shape
        outer, inner = reversed(shape) if is_turned(old) else shape
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, NF4Linear(outer, inner, bias, is_turned(old), name))
