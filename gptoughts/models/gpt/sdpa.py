"""Torch's scaled_dot_product_attention as an attention function, with torch's choice of backend or a fixed one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gptoughts.models.gpt.attention import AttentionFunction


def attend(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Compute attention over query B H T D, key B K S D, value B K S E with grouped heads: an `AttentionFunction` for dense masks.

    Causal: queries are the last T positions. With `mask` (bool, broadcastable to B 1 T S, True = attend) `causal` is not applied.
    """
    return _attend(query, key, value, causal, mask, scale, expand=_must_expand(query, key, mask))


def attend_with_backend(backend: str) -> AttentionFunction:
    """Return `attend` restricted to one member of `torch.nn.attention.SDPBackend`. Torch raises RuntimeError if it cannot run.

    The backend is selected around each call, not around the step, so that compiled graphs include it and no global state changes.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    selected = SDPBackend.__members__[backend]
    supports_groups = backend == "FLASH_ATTENTION"

    def attend(
        query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        expand = query.is_cuda and query.shape[1] != key.shape[1] and not supports_groups
        with sdpa_kernel(selected):
            return _attend(query, key, value, causal, mask, scale, expand=expand)

    return attend


def _must_expand(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Return whether to repeat key heads: on CUDA only flash attention (half precision, no mask) takes grouped heads fused."""
    return query.shape[1] != key.shape[1] and query.is_cuda and (query.dtype is torch.float32 or mask is not None)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None, scale: float | None, *, expand: bool
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    if expand:
        groups = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1), False
    if mask is None and causal and query.shape[2] != key.shape[2]:
        rows, columns = query.shape[2], key.shape[2]
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
    narrow = value.shape[3] < query.shape[3]
    width = value.shape[3]
    if narrow:
        # Flash attention needs equal head widths; latent attention has narrower values, so pad them with zeros.
        value = torch.nn.functional.pad(value, (0, query.shape[3] - width))
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped
    )
    return output[..., :width] if narrow else output
