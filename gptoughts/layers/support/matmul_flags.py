"""Torch's process-wide switches for products: turned for as long as a layer stands, and put back as they were found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Float32 products at `precision` ("highest", "high", "medium") for cuBLAS and oneDNN alike, by `torch.set_float32_matmul_precision`."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before, each = torch.get_float32_matmul_precision(), [backend.fp32_precision for backend in backends]
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for backend, found in zip(backends, each, strict=True):
            backend.fp32_precision = found  # the line before leaves "ieee" where nothing had been set


@contextmanager
def reduced_sums(kind: Literal["bf16", "fp16"], allowed: bool) -> Iterator[None]:
    """Whether cuBLAS may add parts of a product of `kind` in that precision; torch allows it where nobody says otherwise."""
    before = may_reduce(kind)
    _set(kind, allowed)
    try:
        yield
    finally:
        _set(kind, before)


def may_reduce(kind: Literal["bf16", "fp16"]) -> bool:
    """What the switch says now."""
    return bool(getattr(torch.backends.cuda.matmul, f"allow_{kind}_reduced_precision_reduction"))


def _set(kind: str, allowed: bool) -> None:
    cublas, name = torch.backends.cuda.matmul, f"allow_{kind}_reduced_precision_reduction"
    # Newer versions of torch keep a second switch under the same name, which a bare truth value would turn on.
    second = getattr(cublas, f"{name}_split_k", None)
    setattr(cublas, name, allowed if second is None else (allowed, second))
