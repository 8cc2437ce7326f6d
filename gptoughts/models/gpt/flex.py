"""Torch's flex_attention as an attention function: masks as BlockMasks, of which it computes the blocks that are seen and no others."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

OPERATOR = "FlexAttentionAutogradOp"
"""What torch's profiler calls the forward of the unfused operator, which is the one that trains on a CPU."""


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Any = None, scale: float | None = None) -> Tensor:
    """An `AttentionFunction` for masks of the form "blocks". On a GPU one Triton kernel; on a CPU the operator's unfused form.

    Without a BlockMask there is nothing to skip (the few queries behind a key-value cache), and torch's other fused attention
    computes.
    """
    query, key, value = in_one_dtype(query, key, value)
    grouped = query.shape[1] != key.shape[1]
    if mask is None or isinstance(mask, Tensor):
        return _without_blocks(query, key, value, causal, mask, scale, grouped)
    if query.is_cuda:
        function = _flex_attention() if torch.compiler.is_compiling() else _compiled()
        return function(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)
    return unfused(query, key, value, mask, scale)


def unfused(query: Tensor, key: Tensor, value: Tensor, blocks: Any, scale: float | None = None) -> Tensor:
    """The operator behind flex_attention, which writes all scores and has gradients everywhere.

    The public function refuses gradients on a CPU, because its compiled form has none there.
    """
    operator = torch.ops.higher_order.flex_attention
    scale = query.shape[3] ** -0.5 if scale is None else scale
    return operator(query, key, value, _score, blocks.as_tuple(), scale, {})[0]


def in_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast would make of them: rotary positions in float32 leave queries wider than values, and these functions want one type."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (query.dtype, key.dtype, value.dtype):
        dtype = torch.get_autocast_dtype(kind)
        return query.to(dtype), key.to(dtype), value.to(dtype)
    dtype = torch.promote_types(query.dtype, torch.promote_types(key.dtype, value.dtype))
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _score(score: Tensor, *where: Tensor) -> Tensor:
    return score


def _without_blocks(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None, scale: float | None, grouped: bool
) -> Tensor:
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
    """One compiled function for every block of an eager model: uncompiled it would write the whole T x T scores."""
    return torch.compile(_flex_attention(), fullgraph=True, dynamic=False)
