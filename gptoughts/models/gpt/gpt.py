"""Native GPT: GPT-2 and its modern form (RMSNorm, RoPE, SwiGLU, grouped-query heads, QK-norm).

    tokens -> embed (+ positions) -> depth x [ norm, attention, add; norm, mlp, add ] -> norm -> head -> loss or logits

Attention and rotary positions are in `attention.py`.
With `causal=False` each token attends to all of its document: the mask predictor of masked diffusion (LLaDA).
Shapes are in comments: B sequences, T new tokens, S tokens to attend to (S > T with a cache), C width,
H query heads, K key-value heads, D head width, V rows of the embedding.

Functions with faster implementations are plain attributes that layers replace: `Attention.attend` with `GPT.masking`, which
builds its mask, `Attention.rotate`, and `Head.loss`.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gptoughts.config.loader import ModelConfig
from gptoughts.models.gpt.attention import AttentionFunction, RotaryFunction, math_attention, rotary_tables, rotate_both
from gptoughts.models.gpt.masks import MaskFunction, dense_mask

Reduction = Literal["sum", "rows"]


class LossFunction(Protocol):
    """loss(hidden B T C, weight V C, labels B T, reduction) -> summed cross-entropy: a scalar, or with "rows" B sums."""

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor, reduction: Reduction = "sum") -> Tensor: ...


NORM_EPSILON = 1e-5  # GPT-2's and Llama's
IGNORED_LABEL = -100


# --- normalization: statistics and scale in fp32 for any input dtype, because bf16 has 8 significant bits


class RMSNorm(nn.RMSNorm):
    """Scale by the root mean square of the last dimension (Zhang and Sennrich 2019), in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).type_as(x)


class LayerNorm(nn.LayerNorm):
    """Center and scale the last dimension (Ba et al. 2016), with or without a bias, in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).type_as(x)


def make_norm(config: ModelConfig) -> nn.Module:
    """Build the recipe's norm over the width."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.width, eps=NORM_EPSILON)
    return LayerNorm(config.width, eps=NORM_EPSILON, bias=config.bias)


def make_dropout(config: ModelConfig) -> nn.Module:
    """Build dropout, or the identity for rate 0."""
    return nn.Dropout(config.dropout) if config.dropout else nn.Identity()


# --- key-value cache


class KeyValueCache:
    """Keys and values of the tokens so far, so that each next token computes one position only.

    Memory for `length` tokens is allocated at the first call, in the dtype and on the device of the first keys.
    Pass the same object to every `GPT.forward` of one batch. `used` counts the stored tokens.
    """

    def __init__(self, depth: int, length: int) -> None:
        self.length = length
        self.used = 0
        self.blocks = [BlockCache(self) for _ in range(depth)]


class BlockCache:
    """One block's part of a KeyValueCache."""

    def __init__(self, cache: KeyValueCache) -> None:
        self.cache = cache
        self.stored: Tensor | None = None  # 2 B K length D

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of T new tokens (B K T D). Returns all so far (B K S D)."""
        B, K, T, D = key.shape
        if self.stored is None:
            self.stored = key.new_zeros(2, B, K, self.cache.length, D)
        end = self.cache.used + T
        self.stored[0, :, :, self.cache.used : end] = key
        self.stored[1, :, :, self.cache.used : end] = value
        return self.stored[0, :, :, :end], self.stored[1, :, :, :end]


# --- attention


class Attention(nn.Module):
    """Self-attention with one fused projection: queries, keys, values in this order."""

    def __init__(self, config: ModelConfig, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.head_dim = config.head_dim
        self.heads = (config.heads, config.key_value_heads, config.key_value_heads)
        self.qkv = nn.Linear(config.width, sum(self.heads) * config.head_dim, bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)
        # Per head, before the rotation (Henry et al. 2020; one scale for all heads, as in Qwen3). Always RMSNorm.
        self.query_norm = RMSNorm(config.head_dim, eps=NORM_EPSILON) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(config.head_dim, eps=NORM_EPSILON) if config.qk_norm else nn.Identity()
        self.attend: AttentionFunction = math_attention
        self.rotate: RotaryFunction = rotate_both

    def forward(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, cache: BlockCache | None = None, mask: Any = None
    ) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim)  # B T H+2K D
        query, key, value = qkv.split(self.heads, dim=2)
        query = self.query_norm(query).transpose(1, 2)  # B H T D
        key = self.key_norm(key).transpose(1, 2)  # B K T D
        value = value.transpose(1, 2)
        if cos is not None and sin is not None:
            query, key = self.rotate(query, key, cos, sin)
        if cache is not None:
            key, value = cache.extend(key, value)  # B K S D
        if mask is None:
            output = self.attend(query, key, value, self.causal)  # B H T D
        else:
            output = self.attend(query, key, value, self.causal, mask)
        return self.out(output.transpose(1, 2).reshape(B, T, C))


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

    Blocks differ in their weights only, and rotary tables are arguments, so torch.compile builds one graph for all blocks.
    An integer attribute that differs would cause a graph per block, and eager blocks beyond the recompile limit.
    """

    def __init__(self, config: ModelConfig, causal: bool = True) -> None:
        super().__init__()
        self.norm1 = make_norm(config)
        self.attention = Attention(config, causal)
        self.norm2 = make_norm(config)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else GELU(config)
        self.dropout = make_dropout(config)

    def forward(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, cache: BlockCache | None = None, mask: Any = None
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), cos, sin, cache, mask))  # B T C
        return x + self.dropout(self.mlp(self.norm2(x)))


def full_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: Reduction = "sum") -> Tensor:
    """Return the cross-entropy summed over all labels except -100, in fp32, from all B T V logits: the reference.

    A `LossFunction`: a scalar, or with reduction "rows" one sum per row, B.
    """
    logits = F.linear(hidden, weight).float().flatten(0, -2)  # BT V
    targets = labels.long().flatten()
    if reduction == "sum":
        return F.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="sum")
    return F.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="none").view(labels.shape).sum(dim=-1)


class Head(nn.Module):
    """Output layer: logits or loss. Padding rows of the vocabulary count as classes; sampling never emits them."""

    weight: Tensor

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, config.width).normal_(std=0.02))
        self.loss: LossFunction = full_cross_entropy

    def forward(self, hidden: Tensor, labels: Tensor | None = None, reduction: Reduction = "sum") -> Tensor:
        """Return logits B T V, or with labels (B T, already shifted, -100 ignored) the summed loss: a scalar, or B with "rows"."""
        if labels is None:
            return F.linear(hidden, self.weight)
        return self.loss(hidden, self.weight, labels, reduction)


class GPT(nn.Module):
    """Decoder-only pre-norm transformer (Radford et al. 2019) with `vocab_size` embedding rows.

    With `causal=False` a bidirectional encoder with a language-model head (Nie et al. 2025, LLaDA), without cache.
    Dropout is applied as in GPT-2, after the embedding and on both residual branches, but not on attention
    probabilities: the fused kernels that replace `attend` have no dropout. Can be built under `torch.device("meta")`;
    then call `build_buffers` after the weights are allocated.
    """

    cos: Tensor | None
    sin: Tensor | None

    def __init__(self, config: ModelConfig, vocab_size: int, sequence_length: int, causal: bool = True) -> None:
        super().__init__()
        self.config = config
        self.causal = causal
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.masking: MaskFunction = dense_mask
        self.embed = nn.Embedding(vocab_size, config.width)
        self.positions = nn.Embedding(sequence_length, config.width) if config.positions == "learned" else None
        self.dropout = make_dropout(config)
        self.blocks = nn.ModuleList(Block(config, causal) for _ in range(config.depth))
        self.norm = make_norm(config)
        self.head = Head(config, vocab_size)
        self.tie()
        self.build_buffers(torch.get_default_device())

    def tie(self) -> None:
        """Share the embedding's Parameter with the head if the recipe ties them."""
        if self.config.tied:
            self.head.weight = self.embed.weight

    def build_buffers(self, device: torch.device) -> None:
        """Compute the rotary tables on `device`. They follow from the recipe, so checkpoints do not contain them."""
        cos = sin = None
        if self.config.positions == "rope":
            cos, sin = rotary_tables(self.sequence_length, self.config.head_dim, self.config.rope_theta, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        cache: KeyValueCache | None = None,
        positions: Tensor | None = None,
        reduction: Reduction = "sum",
    ) -> Tensor:
        """Return logits B T V of integer `input_ids` B T, or with `labels` (B T, shifted, -100 ignored) the summed loss.

        `positions` (B T, integer) count inside each document of a row; 0 starts a document, and tokens attend within their
        document only. Without `positions` a row is one document. With a cache the tokens continue the cached ones.
        `reduction` "rows" gives one sum per row, B. Raises ValueError for more than `sequence_length` tokens, for positions
        outside the tables (checked on the CPU only; on a GPU the lookup fails), and for a cache with positions or with
        `causal=False`.
        """
        start = cache.used if cache is not None else 0
        end = start + input_ids.shape[1]
        if end > self.sequence_length:
            raise ValueError(f"input_ids: at most sequence_length = {self.sequence_length} tokens. Found {end}")
        if cache is not None and (positions is not None or not self.causal):
            raise ValueError("cache: needs a causal model and one document per row (no positions)")
        x = self.embed(input_ids.long())  # B T C
        # Once for all blocks. A cache has one document per row, so `causal` is enough there.
        mask = self.masking(positions, self.causal, input_ids) if cache is None else None
        cos = self.cos[start:end] if self.cos is not None else None  # T D/2
        sin = self.sin[start:end] if self.sin is not None else None
        if positions is not None:
            self._check_positions(positions)
            cos = self.cos[positions].unsqueeze(1) if self.cos is not None else None  # B 1 T D/2
            sin = self.sin[positions].unsqueeze(1) if self.sin is not None else None
        if self.positions is not None:
            x = x + self.positions(torch.arange(start, end, device=x.device) if positions is None else positions)
        x = self.dropout(x)
        for index, block in enumerate(self.blocks):
            x = block(x, cos, sin, cache.blocks[index] if cache is not None else None, mask)
        if cache is not None:
            cache.used = end
        return self.head(self.norm(x), labels, reduction)

    def _check_positions(self, positions: Tensor) -> None:
        if positions.is_cpu and positions.numel() and not torch.compiler.is_compiling():  # on a GPU it would synchronize
            low, high = (int(value) for value in positions.aminmax())
            if low < 0 or high >= self.sequence_length:
                raise ValueError(f"positions: must be from 0 to {self.sequence_length - 1}. Found {low} to {high}")
