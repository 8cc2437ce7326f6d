"""Torch's flex_attention as an attention function; it skips the blocks that its BlockMask masks out."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

OPERATOR = "FlexAttentionAutogradOp"
"""Profiler name of the unfused operator's forward, which is used for training on a CPU."""


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Any = None, scale: float | None = None) -> Tensor:
    """Compute attention for masks of the form "blocks": one Triton kernel on a GPU, the unfused operator on a CPU.

    Without a BlockMask (new queries after a key-value cache) there are no blocks to skip, and torch's scaled_dot_product_attention
    is called.
    """
    query, key, value = in_one_dtype(query, key, value)
    grouped = query.shape[1] != key.shape[1]
    if mask is None or isinstance(mask, Tensor):
        return _sdpa(query, key, value, causal, mask, scale)
    if query.is_cuda:
        function = _flex_attention() if torch.compiler.is_compiling() else _compiled()
        return function(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)
    return unfused(query, key, value, mask, scale)


def unfused(query: Tensor, key: Tensor, value: Tensor, blocks: Any, scale: float | None = None) -> Tensor:
    """Call flex_attention's operator, which stores all scores and has gradients on every device.

    The public function refuses gradients on a CPU, because its compiled form has no CPU backward.
    """
    operator = torch.ops.higher_order.flex_attention
    scale = query.shape[3] ** -0.5 if scale is None else scale
    return operator(query, key, value, _unchanged, blocks.as_tuple(), scale, {})[0]


def in_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast to autocast's dtype, or to the widest of the three: fp32 rotary positions make queries wider than values."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (query.dtype, key.dtype, value.dtype):
        dtype = torch.get_autocast_dtype(kind)
        return query.to(dtype), key.to(dtype), value.to(dtype)
    dtype = torch.promote_types(query.dtype, torch.promote_types(key.dtype, value.dtype))
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _unchanged(score: Tensor, *indices: Tensor) -> Tensor:
    return score


def _sdpa(query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None, scale: float | None) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    rows, columns = query.shape[2], key.shape[2]
    if mask is None and causal and rows != columns:
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
    causal = causal and mask is None
    return scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def _flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@cache
def _compiled() -> Any:
    """Return one compiled function for all blocks of an eager model; uncompiled it would store T x T scores."""
    return torch.compile(_flex_attention(), fullgraph=True, dynamic=False)
