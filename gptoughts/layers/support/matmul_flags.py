"""Torch's process-wide matmul flags, set inside a context and restored on exit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Set float32 matmul precision ("highest", "high", "medium") for cuBLAS and oneDNN, by `torch.set_float32_matmul_precision`."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before, each = torch.get_float32_matmul_precision(), [backend.fp32_precision for backend in backends]
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for backend, found in zip(backends, each, strict=True):
            backend.fp32_precision = found  # the line before leaves "ieee" where nothing was set


@contextmanager
def reduced_sums(kind: Literal["bf16", "fp16"], allowed: bool) -> Iterator[None]:
    """Set whether cuBLAS may accumulate parts of a product of `kind` in that precision; torch's default allows it."""
    before = may_reduce(kind)
    _set(kind, allowed)
    try:
        yield
    finally:
        _set(kind, before)


def may_reduce(kind: Literal["bf16", "fp16"]) -> bool:
    """Return the current flag of `reduced_sums`."""
    return bool(getattr(torch.backends.cuda.matmul, f"allow_{kind}_reduced_precision_reduction"))


def _set(kind: str, allowed: bool) -> None:
    cublas, name = torch.backends.cuda.matmul, f"allow_{kind}_reduced_precision_reduction"
    # Newer torch has a second flag under the same name, which a plain bool would turn on.
    second = getattr(cublas, f"{name}_split_k", None)
    setattr(cublas, name, allowed if second is None else (allowed, second))
