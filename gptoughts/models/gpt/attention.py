"""Attention as every model here computes it: its contract, the reference, who sees whom in packed rows, rotary positions.

Shapes: B sequences, T queries, S keys, H query heads, K key-value heads, D head width, E width of the values.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class AttentionFunction(Protocol):
    """attend(query B H T D, key B K S D, value B K S E, causal) -> B H T E, and where documents share rows its mask.

    `mask` has the form that the function was put in place with (`packing.MaskForm`). Dense: bool, broadcastable to B 1 T S,
    True = may attend; it says everything and `causal` is not applied again. `scale` None is D**-0.5. E may differ from D.
    """

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Any = None, scale: float | None = None
    ) -> Tensor: ...


class RotaryFunction(Protocol):
    """rotate(query B H T D, key B K T D, cos, sin) -> both, turned by their positions; tables as in `rotate`."""

    def __call__(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]: ...


def math_attention(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attention as in Vaswani et al. 2017, with an fp32 softmax: slow, exact, the reference for every faster one.

    An `AttentionFunction`. K divides H (Ainslie et al. 2023: query head h reads key head h*K//H). Causal with T < S: the
    queries are the last T positions. A query whose mask is all False gets NaN. Returns B H T E in the values' dtype.
    """
    B, H, T, D = query.shape
    K, S = key.shape[1], key.shape[2]
    G = H // K  # query heads that share one key head; they are stacked along T, so keys are never copied
    scores = query.reshape(B, K, G * T, D) @ key.transpose(-2, -1)  # B K GT S
    scores = scores.float().view(B, K, G, T, S) * (D**-0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(2), float("-inf"))  # B 1 1 T S
    elif causal:
        future = torch.ones(T, S, dtype=torch.bool, device=query.device).triu(S - T + 1)
        scores = scores.masked_fill(future, float("-inf"))
    share = scores.softmax(dim=-1).to(value.dtype).view(B, K, G * T, S)
    return (share @ value).view(B, H, T, value.shape[3])


def document_mask(positions: Tensor, causal: bool) -> Tensor:
    """Who may attend to whom where documents share a row: bool B 1 T T, True = may; every token attends to itself.

    `positions` B T count inside each document; a 0 begins one.
    """
    document = (positions == 0).cumsum(dim=1)  # B T
    mask = document[:, None, :, None] == document[:, None, None, :]
    return mask.tril() if causal else mask


def rotary_tables(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position and frequency, fp32, each T D/2 (Su et al. 2021, RoFormer).

    Worked out in fp64 on the CPU: at position 100,000 an fp32 angle is off by up to a hundredth of a radian.
    """
    where = device if device.type == "meta" else torch.device("cpu")
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=where) / head_dim  # D/2
    angle = torch.arange(length, dtype=torch.float64, device=where)[:, None] * theta**-exponent  # T D/2
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of channels by their position's angle: channel i with i + D/2 (Llama's order, not interleaved).

    The tables are T D/2, or B 1 T D/2 where rows have positions of their own.
    """
    first, second = x.float().chunk(2, dim=-1)  # B H T D/2
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)  # B H T D


def rotate_both(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate` for queries and keys: a `RotaryFunction`, the reference."""
    return rotate(query, cos, sin), rotate(key, cos, sin)
