"""Torch's scaled_dot_product_attention as an attention function, free to choose its backend or held to one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gptoughts.models.gpt.attention import AttentionFunction


def attend(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attention over query B H T D, key B K S D, value B K S E with K heads shared by groups: an `AttentionFunction` for dense masks.

    Causal: queries are the last T positions. `mask` (bool, broadcastable to B 1 T S, True = may attend) says everything; `causal` is
    then not applied.
    """
    return _attend(query, key, value, causal, mask, scale, copied=_copies(query, key, mask))


def held(backend: str) -> AttentionFunction:
    """`attend` with torch held to one member of `torch.nn.attention.SDPBackend`. Torch raises RuntimeError where it cannot run.

    The choice stands around the call and not around the step, so that a compiled graph holds it too and nothing stays switched.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    only = SDPBackend.__members__[backend]
    takes_groups = backend == "FLASH_ATTENTION"

    def attend(
        query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        copied = query.is_cuda and query.shape[1] != key.shape[1] and not takes_groups
        with sdpa_kernel(only):
            return _attend(query, key, value, causal, mask, scale, copied)

    return attend


def _copies(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """On CUDA only flash attention takes grouped heads, in half precision and without a mask; copied heads keep the rest fused."""
    return query.shape[1] != key.shape[1] and query.is_cuda and (query.dtype is torch.float32 or mask is not None)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None, scale: float | None, copied: bool
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    if copied:
        copies = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1), False
    if mask is None and causal and query.shape[2] != key.shape[2]:
        rows, columns = query.shape[2], key.shape[2]
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
    narrow = value.shape[3] < query.shape[3]
    width = value.shape[3]
    if narrow:
        # Flash attention wants one head width, and latent attention has narrower values: zeros behind them add nothing.
        value = torch.nn.functional.pad(value, (0, query.shape[3] - width))
    mixed = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped
    )
    return mixed[..., :width] if narrow else mixed
