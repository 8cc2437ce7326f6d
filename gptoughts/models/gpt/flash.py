"""FlashAttention from its packages, and torch's own for documents laid end to end: attention functions for masks of the form "lengths".

The one file that imports flash_attn (2.x and, under `flash_attn.cute`, 4) and flash_attn_interface (3). They compute in half precision
over B T H D, or T H D with the bounds of documents; ours is B H T D.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gptoughts.errors import LayerError
from gptoughts.models.gpt.attention import AttentionFunction
from gptoughts.models.gpt.flex import in_one_dtype
from gptoughts.models.gpt.masks import Documents

Version = Literal["fa2", "fa3", "fa4"]
Kernel = Callable[..., Any]

HALF = (torch.float16, torch.bfloat16)


def attention(version: Version) -> AttentionFunction:
    """An `AttentionFunction` by a package's kernels. Raises LayerError quoting the package where it is installed and broken."""
    rows, documents = _imported(version)

    def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Any = None, scale: float | None = None) -> Tensor:
        query, key, value = _in_half(version, query, key, value, mask)
        width = value.shape[3]
        if version == "fa2" and width < query.shape[3]:
            # FlashAttention-2 has one head width; latent attention's values are narrower, and zeros behind them add nothing.
            value = torch.nn.functional.pad(value, (0, query.shape[3] - width))
        words = {"softmax_scale": scale, "causal": causal}
        if mask is None:
            mixed = rows(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), **words)
            return _first(mixed).transpose(1, 2)[..., :width]  # B H T E
        words |= {"cu_seqlens_q": mask.bounds, "cu_seqlens_k": mask.bounds}
        words |= {"max_seqlen_q": mask.longest, "max_seqlen_k": mask.longest}
        return as_rows(_first(documents(*map(as_line, (query, key, value)), **words)), query)[..., :width]

    return attend


def torch_varlen() -> AttentionFunction:
    """An `AttentionFunction` by torch's own `varlen_attn`, which has changed its words from version to version."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise LayerError(f"attention=varlen: torch {torch.__version__} has no varlen_attn; needs torch 2.10") from error
    takes, attended = inspect.signature(varlen_attn).parameters, cast("Callable[..., Tensor]", varlen_attn)

    def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Any = None, scale: float | None = None) -> Tensor:
        query, key, value = _in_half("varlen", query, key, value, mask)
        if mask is None:  # rows that are one document each, or the few queries behind a cache
            return _one_document(query, key, value, causal, scale)
        width, heads = value.shape[3], query.shape[1] // key.shape[1]
        if width < query.shape[3]:
            value = torch.nn.functional.pad(value, (0, query.shape[3] - width))
        words: dict[str, Any] = {"window_size": (-1, 0 if causal else -1)} if "window_size" in takes else {"is_causal": causal}
        if "scale" in takes:
            words["scale"] = scale
        elif scale is not None:  # it then divides by the square root of the width
            query = query * (scale * query.shape[3] ** 0.5)
        if "enable_gqa" in takes:
            words["enable_gqa"] = heads > 1
        elif heads > 1:
            key, value = key.repeat_interleave(heads, dim=1), value.repeat_interleave(heads, dim=1)
        bounds, longest = mask
        mixed = attended(as_line(query), as_line(key), as_line(value), bounds, bounds, longest, longest, **words)
        return as_rows(mixed, query)[..., :width]

    return attend


def as_line(heads: Tensor) -> Tensor:
    """B H T D -> BT H D: rows laid end to end, as the bounds of documents count them."""
    return heads.transpose(1, 2).flatten(0, 1)


def as_rows(line: Tensor, like: Tensor) -> Tensor:
    """BT H E -> B H T E, with B and T of `like`."""
    return line.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


def _in_half(name: str, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = in_one_dtype(query, key, value)
    if mask is not None and not isinstance(mask, Documents):
        raise LayerError(f"attention={name}: takes the bounds of documents, not a mask\n  try: --layer.attention sdpa")
    if query.dtype not in HALF:
        raise LayerError(f"attention={name}: computes in half precision, here {query.dtype}\n  try: --layer.precision bf16")
    return query, key, value


def _one_document(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Tensor:
    rows, columns = query.shape[2], key.shape[2]
    mask = None
    if causal and rows != columns:
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
    return scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal and mask is None, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def _first(given: Any) -> Tensor:
    """The output alone: FlashAttention-4 and some builds of 3 give the log-sum-exp beside it."""
    return given[0] if isinstance(given, tuple) else given


def _imported(version: Version) -> tuple[Kernel, Kernel]:
    """The package's functions over rows and over documents."""
    try:
        if version == "fa2":
            from flash_attn import flash_attn_func, flash_attn_varlen_func
        elif version == "fa3":
            from flash_attn_interface import flash_attn_func, flash_attn_varlen_func
        else:
            from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
    except Exception as error:  # a broken build raises ImportError, OSError, RuntimeError or whatever its dependencies do
        raise LayerError(f"attention={version}: installed and does not import: {type(error).__name__}: {error}") from error
    if version == "fa3":
        _refuse_inference_build()
    return flash_attn_func, flash_attn_varlen_func


def _refuse_inference_build() -> None:
    """Builds for serving leave the backward out and say so in a file of their own."""
    try:
        from flash_attn_config import CONFIG
    except ImportError:  # not every build has this file; the backward itself then says what it lacks
        return
    if CONFIG.get("build_flags", {}).get("FLASHATTENTION_DISABLE_BACKWARD"):
        raise LayerError(
            "attention=fa3: this build of FlashAttention-3 was made for inference and has no backward (FLASHATTENTION_DISABLE_BACKWARD)\n"
            "  try: a build from the hopper folder of Dao-AILab/flash-attention, or --layer.attention sdpa"
        )
