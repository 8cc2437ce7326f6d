"""The native GPT, top to bottom: GPT-2 and its modern form (RMSNorm, RoPE, SwiGLU, grouped-query heads, QK-norm).

    tokens -> embed (+ positions) -> depth x [ norm, attention, add; norm, mlp, add ] -> norm -> head -> loss or logits

Shapes stand behind the lines: B sequences, T new tokens, S tokens to attend to (S > T with a cache), C width,
H query heads, K key-value heads, D head width, V rows of the embedding.

Two things are plain attributes, to be replaced by whoever has something faster: `Attention.attend` and `Head.loss`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gptoughts.config import ModelConfig

AttentionFunction = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

NORM_EPSILON = 1e-5  # GPT-2's and Llama's
IGNORED_LABEL = -100


# --- normalisation: statistics and scale in fp32 whatever the input, because bf16 has 8 bits to square with


class RMSNorm(nn.RMSNorm):
    """Scale by the root mean square of the last dimension (Zhang and Sennrich 2019), in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).type_as(x)


class LayerNorm(nn.LayerNorm):
    """Centre and scale the last dimension (Ba et al. 2016), with or without a bias, in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).type_as(x)


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm that the recipe names, over the width."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.width, eps=NORM_EPSILON)
    return LayerNorm(config.width, eps=NORM_EPSILON, bias=config.bias)


def make_dropout(config: ModelConfig) -> nn.Module:
    """Dropout, or nothing at all where its rate is 0."""
    return nn.Dropout(config.dropout) if config.dropout else nn.Identity()


# --- positions


def rotary_tables(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position and frequency, fp32, each T D/2 (Su et al. 2021, RoFormer).

    Worked out in fp64 on the CPU: at position 100,000 an fp32 angle is off by up to a hundredth of a radian.
    """
    where = device if device.type == "meta" else torch.device("cpu")
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=where) / head_dim  # D/2
    angle = torch.arange(length, dtype=torch.float64, device=where)[:, None] * theta**-exponent  # T D/2
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of channels by their position's angle: channel i with i + D/2 (Llama's order, not interleaved)."""
    first, second = x.float().chunk(2, dim=-1)  # B H T D/2
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)  # B H T D


# --- key-value cache


class KeyValueCache:
    """Keys and values of the tokens seen so far, so that each next token costs one position instead of all.

    Room for `length` tokens is allocated once, at the first call, in the dtype and on the device of the first keys.
    Pass the same object to every `GPT.forward` of one batch; `length` of them fit, `used` are taken.
    """

    def __init__(self, depth: int, length: int) -> None:
        self.length = length
        self.used = 0
        self.blocks = [BlockCache(self) for _ in range(depth)]


class BlockCache:
    """One block's share of a KeyValueCache."""

    def __init__(self, cache: KeyValueCache) -> None:
        self.cache = cache
        self.stored: Tensor | None = None  # 2 B K length D

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of T new tokens (B K T D) behind the old ones; returns all so far (B K S D)."""
        B, K, T, D = key.shape
        if self.stored is None:
            self.stored = key.new_zeros(2, B, K, self.cache.length, D)
        end = self.cache.used + T
        self.stored[0, :, :, self.cache.used : end] = key
        self.stored[1, :, :, self.cache.used : end] = value
        return self.stored[0, :, :, :end], self.stored[1, :, :, :end]


# --- attention


def math_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Attention as in Vaswani et al. 2017, with an fp32 softmax: slow, exact, the reference for every faster one.

    query B H T D, key and value B K S D with K dividing H (Ainslie et al. 2023: query head h reads key head h*K//H).
    Causal with T < S: the queries are the last T positions. Returns B H T D in the values' dtype.
    """
    B, H, T, D = query.shape
    K, S = key.shape[1], key.shape[2]
    G = H // K  # query heads that share one key head; they are stacked along T, so keys are never copied
    scores = query.reshape(B, K, G * T, D) @ key.transpose(-2, -1)  # B K GT S
    scores = scores.float().view(B, K, G, T, S) * D**-0.5
    if causal:
        future = torch.ones(T, S, dtype=torch.bool, device=query.device).triu(S - T + 1)
        scores = scores.masked_fill(future, float("-inf"))
    share = scores.softmax(dim=-1).to(value.dtype).view(B, K, G * T, S)
    return (share @ value).view(B, H, T, D)


class Attention(nn.Module):
    """Causal self-attention with one fused projection for queries, keys and values, in this order."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = (config.heads, config.key_value_heads, config.key_value_heads)
        self.qkv = nn.Linear(config.width, sum(self.heads) * config.head_dim, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)
        # Per head, before the rotation (Henry et al. 2020; one scale for all heads, as in Qwen3). Always an RMSNorm.
        self.query_norm = RMSNorm(config.head_dim, eps=NORM_EPSILON) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(config.head_dim, eps=NORM_EPSILON) if config.qk_norm else nn.Identity()
        self.attend: AttentionFunction = math_attention

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, cache: BlockCache | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim)  # B T H+2K D
        query, key, value = qkv.split(self.heads, dim=2)
        query = self.query_norm(query).transpose(1, 2)  # B H T D
        key = self.key_norm(key).transpose(1, 2)  # B K T D
        value = value.transpose(1, 2)
        if cos is not None and sin is not None:
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if cache is not None:
            key, value = cache.extend(key, value)  # B K S D
        mixed = self.attend(query, key, value, True)  # B H T D
        return self.out(mixed.transpose(1, 2).reshape(B, T, C))


# --- mlp


class GELU(nn.Module):
    """GPT-2's MLP: up, GELU in its tanh form, down."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.inner, bias=config.bias)
        self.down = nn.Linear(config.inner, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """The gated MLP of Shazeer 2020: down(silu(gate(x)) * up(x)), gate and up in one projection, in this order."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.inner, bias=config.bias)
        self.down = nn.Linear(config.inner, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # B T inner
        return self.down(F.silu(gate) * up)


# --- block, head, model


class Block(nn.Module):
    """One pre-norm transformer block.

    Nothing differs from block to block but the weights, and the rotary tables come as arguments: torch.compile builds
    one graph for all. An integer that differed would build one each, and leave blocks eager once its cache is full.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = make_norm(config)
        self.attention = Attention(config)
        self.norm2 = make_norm(config)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else GELU(config)
        self.dropout = make_dropout(config)

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, cache: BlockCache | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), cos, sin, cache))  # B T C
        return x + self.dropout(self.mlp(self.norm2(x)))


def full_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The sum of the cross-entropies over all labels but -100, in fp32, from all B T V logits: the reference."""
    logits = F.linear(hidden, weight).float().flatten(0, -2)  # BT V
    return F.cross_entropy(logits, labels.long().flatten(), ignore_index=IGNORED_LABEL, reduction="sum")


class Head(nn.Module):
    """From hidden states to logits or loss. Rows that pad the vocabulary are classes too; sampling never emits them."""

    weight: Tensor

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, config.width).normal_(std=0.02))
        self.loss: LossFunction = full_cross_entropy

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits B T V, or with labels (B T, already shifted, -100 ignored) the summed loss, a scalar."""
        if labels is None:
            return F.linear(hidden, self.weight)
        return self.loss(hidden, self.weight, labels)


class GPT(nn.Module):
    """A decoder-only transformer (Radford et al. 2019), pre-norm, over `vocab_size` embedding rows.

    Dropout stands where GPT-2 has it, behind the embedding and on both residual branches, but not on attention
    probabilities: the fused kernels that replace `attend` have none. May be built under `torch.device("meta")`;
    `build_buffers` then belongs after the weights were allocated.
    """

    cos: Tensor | None
    sin: Tensor | None

    def __init__(self, config: ModelConfig, vocab_size: int, sequence_length: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.embed = nn.Embedding(vocab_size, config.width)
        self.positions = nn.Embedding(sequence_length, config.width) if config.positions == "learned" else None
        self.dropout = make_dropout(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = make_norm(config)
        self.head = Head(config, vocab_size)
        self.tie()
        self.build_buffers(torch.get_default_device())

    def tie(self) -> None:
        """Make the head's weight the embedding's, the same Parameter, where the recipe ties them."""
        if self.config.tied:
            self.head.weight = self.embed.weight

    def build_buffers(self, device: torch.device) -> None:
        """Write the rotary tables on `device`, afresh. They follow from the recipe, so no checkpoint holds them."""
        cos = sin = None
        if self.config.positions == "rope":
            cos, sin = rotary_tables(self.sequence_length, self.config.head_dim, self.config.rope_theta, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Logits B T V of integer `input_ids` B T; with `labels` (B T, shifted, -100 ignored) the summed loss instead.

        With a cache the tokens continue those it holds. Raises ValueError beyond `sequence_length` tokens.
        """
        start = cache.used if cache is not None else 0
        end = start + input_ids.shape[1]
        if end > self.sequence_length:
            raise ValueError(f"{end} tokens are more than the model's sequence_length of {self.sequence_length}")
        x = self.embed(input_ids.long())  # B T C
        if self.positions is not None:
            x = x + self.positions(torch.arange(start, end, device=x.device))
        x = self.dropout(x)
        cos = self.cos[start:end] if self.cos is not None else None  # T D/2
        sin = self.sin[start:end] if self.sin is not None else None
        for index, block in enumerate(self.blocks):
            x = block(x, cos, sin, cache.blocks[index] if cache is not None else None)
        if cache is not None:
            cache.used = end
        return self.head(self.norm(x), labels)
