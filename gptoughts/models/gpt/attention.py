"""Attention interface, reference implementation, document mask and rotary positions, for all models.

Shapes: B sequences, T queries, S keys, H query heads, K key-value heads, D head width, E width of the values.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class AttentionFunction(Protocol):
    """attend(query B H T D, key B K S D, value B K S E, causal) -> B H T E, with a mask if documents share rows.

    `mask` has the form passed to `set_attention` (`masks.MaskForm`). Dense: bool, broadcastable to B 1 T S, True = attend;
    with a mask `causal` is not applied. `scale` None is D**-0.5. E may differ from D.
    """

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Any = None, scale: float | None = None
    ) -> Tensor: ...


class RotaryFunction(Protocol):
    """rotate(query B H T D, key B K T D, cos, sin) -> both, rotated by their positions; tables as in `rotate`."""

    def __call__(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]: ...


def math_attention(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Compute attention as in Vaswani et al. 2017 with an fp32 softmax: the slow, exact reference.

    An `AttentionFunction`. K divides H (Ainslie et al. 2023: query head h reads key head h*K//H). Causal with T < S: the
    queries are the last T positions. A query whose mask is all False gives NaN. Returns B H T E in the values' dtype.
    """
    B, H, T, D = query.shape
    K, S = key.shape[1], key.shape[2]
    G = H // K  # query heads per key head, stacked along T so that keys are not copied
    scores = query.reshape(B, K, G * T, D) @ key.transpose(-2, -1)  # B K GT S
    scores = scores.float().view(B, K, G, T, S) * (D**-0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(2), float("-inf"))  # B 1 1 T S
    elif causal:
        future = torch.ones(T, S, dtype=torch.bool, device=query.device).triu(S - T + 1)
        scores = scores.masked_fill(future, float("-inf"))
    probabilities = scores.softmax(dim=-1).to(value.dtype).view(B, K, G * T, S)
    return (probabilities @ value).view(B, H, T, value.shape[3])


def document_mask(positions: Tensor, causal: bool) -> Tensor:
    """Return the attention mask of packed documents: bool B 1 T T, True = attend; every token attends to itself.

    `positions` B T count inside each document; 0 starts a document.
    """
    document = (positions == 0).cumsum(dim=1)  # B T
    mask = document[:, None, :, None] == document[:, None, None, :]
    return mask.tril() if causal else mask


def rotary_tables(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every position and frequency, fp32, each T D/2 (Su et al. 2021, RoFormer).

    Computed in fp64 on the CPU: at position 100,000 an fp32 angle is wrong by up to 0.01 radian.
    """
    compute_device = device if device.type == "meta" else torch.device("cpu")
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=compute_device) / head_dim  # D/2
    angle = torch.arange(length, dtype=torch.float64, device=compute_device)[:, None] * theta**-exponent  # T D/2
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of channels by their position's angle: channel i with i + D/2 (Llama's order, not interleaved).

    The tables are T D/2, or B 1 T D/2 with positions per row.
    """
    first, second = x.float().chunk(2, dim=-1)  # B H T D/2
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)  # B H T D


def rotate_both(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys: the reference `RotaryFunction`."""
    return rotate(query, cos, sin), rotate(key, cos, sin)
