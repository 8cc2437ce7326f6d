"""Expected memory of a step per rank, from model sizes alone, without torch or the machine itself.

The baseline is float32, eager, all activations kept; each planned layer then changes its part (`Layer.memory`). Counted are tensors as
torch's allocator sees them. The driver, the CUDA context and fragmentation are not counted; `verdict` keeps a reserve for them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from gptoughts.config.loader import Recipe
from gptoughts.config.model_spec import ModelSpec
from gptoughts.config.tasks import task_of

MASTER_BYTES = 4  # weights, gradients and moments are float32
MOMENTS = {"adamw": 2, "lion": 1, "ademamix": 3, "schedule-free": 2}
NF4_BYTES = 0.5 + 4 / 64  # four bits and one float32 scale in 64 values

FITS_SHARE, TIGHT_SHARE = 0.85, 0.95
"""Shares of the memory available. The rest is a reserve for the CUDA context, cuBLAS and cuDNN workspaces and fragmentation."""


class Verdict(StrEnum):
    """Whether a plan's step fits the memory of its rank."""

    FITS = "fits"
    TIGHT = "tight"
    DOES_NOT = "does not fit"
    UNKNOWN = "n/a"


@dataclass(frozen=True)
class Budget:
    """Bytes of one rank by part, and the counts that determine activations.

    `full` and `compute` are elements per token that a block keeps for its backward: in float32, and in the dtype of matmuls. `scores` are
    elements per token, sequence position and block kept by unfused attention. `inner` is the share of a block's activations kept for
    the backward; the rest is recomputed from the block's input.
    """

    weights: int
    gradients: int
    optimizer: int
    tokens: int
    """Per forward."""
    sequence_length: int
    depth: int
    width: int
    inner_width: int
    """Elements per token inside the MLP."""
    gated: bool
    """Whether the MLP multiplies two branches."""
    full: float
    compute: float
    scores: float
    products: float
    """Elements per token in the outputs of a block's matmuls and attention."""
    mixed: float
    """Elements per token in the output of attention."""
    matmul_parameters: int
    """Elements of the weights of matmuls, without packed ones."""
    vocab_size: int
    copies: float = 0.0
    """Elements per token of a block's activations that are kept again where matmuls take 16 bits: every projection casts its own input."""
    ends: tuple[float, float] = (0.0, 0.0)
    """Elements per token kept outside the blocks: in float32, and in the dtype of matmuls."""
    stream_bytes: float = MASTER_BYTES
    """Bytes per element of the residual stream and of norms: float32 under autocast."""
    compute_bytes: float = 4
    cast_weights: int = 0
    """Bytes of the 16-bit copies of weights if all are kept for the backward."""
    outside_share: float = 0.0
    """Share of `cast_weights` outside the blocks: the head's."""
    recasts: bool = False
    """Whether blocks are recomputed, so that the weights of one block at a time are cast."""
    unpacked: int = 0
    """Elements of the largest frozen weight that is packed (NF4) or 16-bit: one is unpacked or cast at a time."""
    inner: float = 1.0
    moved: float = 0.0
    """Share of the activations offloaded until the backward."""
    logits_tokens: int | None = None
    """Tokens whose logits exist at the same time; None for all tokens of a forward."""
    logit_bytes: float = 12
    accumulates: bool = False
    """Whether gradients of an earlier micro-batch exist during a forward."""
    largest: int = 0
    """Elements of the largest weight."""
    temporary: int = 0
    """Temporary bytes of the optimizer update."""

    @property
    def block_bytes(self) -> float:
        """Activations kept inside one block."""
        copies = self.copies if self.compute_bytes < MASTER_BYTES else 0
        narrow = self.compute + copies + self.scores * self.sequence_length
        return (self.full * self.stream_bytes + narrow * self.compute_bytes) * self.tokens

    @property
    def kept(self) -> int:
        """Activations kept by all blocks until their backward."""
        inputs = self.depth * self.tokens * self.width * self.stream_bytes if self.inner < 1 else 0
        inside = self.depth * self.inner * self.block_bytes + inputs
        outside = self.tokens * (self.ends[0] * self.stream_bytes + self.ends[1] * self.compute_bytes)
        return int((inside + outside) * (1 - self.moved))

    @property
    def activations(self) -> int:
        """Peak activations during the backward, without the loss."""
        return self.kept + int((1 - self.inner) * self.block_bytes)

    @property
    def logits(self) -> int:
        """Logarithms of probabilities and two gradients of them, in float32. 16-bit logits are freed before."""
        tokens = self.tokens if self.logits_tokens is None else min(self.logits_tokens, self.tokens)
        return int(tokens * self.vocab_size * self.logit_bytes)

    def per_forward(self, sequences: int, share: int) -> Budget:
        """Return the budget with `sequences` of a rank's `share` per forward, and gradient accumulation over the others."""
        return replace(self, tokens=sequences * self.sequence_length, accumulates=self.accumulates or sequences < share)

    def without_scores(self) -> Budget:
        """Return the budget with fused attention, which keeps no scores."""
        return replace(self, scores=0)

    def half(self) -> Budget:
        """Return the budget with 16-bit matmuls: half the inputs, and a cast copy of every float32 weight."""
        return replace(self, compute_bytes=2, cast_weights=2 * self.matmul_parameters)

    def only(self, outputs: float) -> Budget:
        """Return the budget with a block's input and `outputs` elements per token kept, and the rest recomputed block by block."""
        return replace(self, full=float(self.width), compute=outputs, copies=0, scores=0, gated=False, recasts=True)

    def compiled(self) -> Budget:
        """Return the budget with compiled blocks: outputs of norms and activation functions are recomputed from their kept inputs, and
        an input is cast once.
        """
        compute = self.compute - (self.inner_width if self.gated else 0)
        return replace(self, full=min(self.full, 2.0 * self.width), compute=compute, copies=0)

    @property
    def casts(self) -> tuple[int, int]:
        """Bytes of 16-bit copies of weights in the loss, and in the backward of a block, when the head's is freed."""
        outside, inside = self.cast_weights * self.outside_share, self.cast_weights * (1 - self.outside_share)
        unpacked = int(self.unpacked * self.compute_bytes)
        if self.recasts:
            return int(outside), int(inside / self.depth) + unpacked
        return int(outside + inside), int(inside) + unpacked

    @property
    def workspace(self) -> int:
        """Weights cast or unpacked for the matmuls, at one time."""
        return max(self.casts)

    @property
    def peak(self) -> int:
        """Peak bytes: in the loss, at the start or end of the backward, or in the update."""
        always = self.weights + self.optimizer
        in_loss, in_block = self.casts
        before = always + (self.gradients if self.accumulates else 0)
        # The gradient of the head comes first; in most models it is the largest weight.
        head = 0 if self.accumulates else self.largest * MASTER_BYTES
        loss = before + in_loss + self.kept + max(self.logits, head)
        first = before + in_block + head + self.activations
        ending = always + in_block + self.gradients + int(self.block_bytes)
        return max(loss, first, ending, always + self.gradients + self.temporary)

    def to_json(self) -> dict[str, Any]:
        """Return the parts in bytes."""
        names = ("weights", "gradients", "optimizer", "activations", "logits", "workspace", "peak")
        return {name: getattr(self, name) for name in names}


def verdict(need: int, memory_bytes: int | None) -> Verdict:
    """Compare `need` bytes with a memory of `memory_bytes`, with a reserve."""
    if memory_bytes is None:
        return Verdict.UNKNOWN
    share = need / max(1, memory_bytes)
    return Verdict.FITS if share <= FITS_SHARE else Verdict.TIGHT if share <= TIGHT_SHARE else Verdict.DOES_NOT


def baseline(spec: ModelSpec, recipe: Recipe, sequences: int) -> Budget | None:
    """Return the budget of a float32 eager step with `sequences` in one forward; None if the model's sizes are unknown."""
    width, depth, parameters = spec.width, spec.depth, spec.parameters
    if width is None or depth is None or parameters is None or spec.sequence_length is None or spec.vocab_size is None:
        return None
    trained = parameters if recipe.adapter.kind == "none" else adapter_parameters(spec, recipe)
    frozen = 0 if recipe.adapter.kind == "none" else parameters
    embedding = spec.embedding_parameters or 0
    head = spec.vocab_size * width
    full, compute, scores, copies = _kept(spec, recipe)
    products, mixed = _outputs(spec)
    matmuls, frozen_bytes, unpacked = parameters - embedding + (head if spec.tied else 0), frozen * MASTER_BYTES, 0
    narrow = {"nf4": NF4_BYTES}.get(recipe.adapter.base, spec.stored_bytes)
    if frozen and narrow is not None and spec.experts is None:
        # Only projections inside blocks are packed or keep the 16 bits of their checkpoint; stacked experts are not projections.
        outside = embedding + (0 if spec.tied else head)
        frozen_bytes = int(outside * MASTER_BYTES + (frozen - outside) * narrow)
        matmuls, unpacked = head, width * max(width, _inner(spec))
    return Budget(
        weights=frozen_bytes + trained * MASTER_BYTES,
        gradients=trained * MASTER_BYTES,
        optimizer=int(trained * MASTER_BYTES * _moments(spec, recipe)),
        tokens=sequences * spec.sequence_length,
        sequence_length=spec.sequence_length,
        depth=depth,
        width=width,
        inner_width=_inner(spec),
        gated=spec.mlp == "swiglu",
        full=full,
        compute=compute,
        scores=scores,
        products=products,
        mixed=mixed,
        copies=copies,
        ends=_ends(spec, frozen > 0),
        matmul_parameters=matmuls + (trained if frozen else 0),
        vocab_size=spec.vocab_size if task_of(recipe).over_vocabulary else 2,
        largest=head if frozen == 0 else 0,
        temporary=2 * max(head, embedding) * MASTER_BYTES if frozen == 0 else 0,
        outside_share=head / (matmuls + (trained if frozen else 0)),
        unpacked=unpacked,
    )


def _moments(spec: ModelSpec, recipe: Recipe) -> float:
    """Return the float32 values of optimizer state per trained parameter."""
    name = recipe.optim.name
    if name in MOMENTS:
        return MOMENTS[name]
    # muon and the apollo optimizers use AdamW outside the blocks' matrices.
    outside = (spec.embedding_parameters or 0) / spec.parameters if spec.parameters else 0.0
    inside = {"muon": 1.0}.get(name, 2 * min(1.0, recipe.optim.rank / (spec.width or 1)))
    return 2 * outside + inside * (1 - outside)


def adapter_parameters(spec: ModelSpec, recipe: Recipe) -> int:
    """Return the parameters of low-rank factors on every projection of every block."""
    assert spec.width is not None and spec.depth is not None
    width, inner = spec.width, spec.hidden or 4 * spec.width
    attention = spec.attention_width or width
    keys = attention * (spec.kv_heads or spec.heads or 1) // (spec.heads or 1)
    sides = (width + attention) * 2 + 2 * (width + keys)
    sides += (3 if spec.mlp == "swiglu" else 2) * (width + inner)
    return spec.depth * sides * recipe.adapter.rank


def _inner(spec: ModelSpec) -> int:
    return (spec.hidden or 4 * (spec.width or 0)) * (spec.experts_per_token or 1)


def _kept(spec: ModelSpec, recipe: Recipe) -> tuple[float, float, float, float]:
    """Return elements per token kept by a block in an eager forward: in float32, in the dtype of matmuls, scores per position, and copies
    of inputs of projections.

    Counted tensor by tensor on the models; tests compare them with measured peaks.
    """
    width, attention, keys = _widths(spec)
    inner = _inner(spec)
    native = recipe.model.family in ("gpt", "llada")
    rotary = spec.norm == "rmsnorm" if not native else recipe.model.positions == "rope"
    grouped = keys < attention
    adapted = recipe.adapter.kind != "none"
    full = 2.0 * width * _per_norm(spec, adapted)
    full += 2.0 * (attention + keys) if native and recipe.model.qk_norm else 0.0
    # Inputs of the two groups of projections; queries, keys, values and the attention output.
    compute = 2.0 * width + (attention + 2 * keys) + attention
    compute += (attention + keys if native else 0) if rotary else 0
    compute += attention if grouped and native else 0
    compute += 4.0 * inner if spec.mlp == "swiglu" else 2.0 * inner
    # Native projections of one input are one matrix. Separate ones cast a float32 input, which a norm returns, once each.
    copies = 0.0 if native else width * (3.0 if spec.mlp == "swiglu" else 2.0)
    if adapted:  # an adapter casts its input to float32 and back: also the attention output, which attention keeps in 16 bits
        copies += attention
        compute += recipe.adapter.rank * ((2 if native else 4) + (3 if spec.mlp == "swiglu" and not native else 2))
    return full, compute, float(spec.heads or 1), copies


def _per_norm(spec: ModelSpec, frozen: bool) -> int:
    """Return the tensors kept by a norm: its input and, for the gradient of its weight, the normalized value, if it is written as several
    operators.
    """
    return 2 if spec.norm == "rmsnorm" and not frozen else 1


def _ends(spec: ModelSpec, frozen: bool) -> tuple[float, float]:
    """Return elements per token kept by the last norm and, for the gradient of its weight, the head: in float32, and in the dtype of
    matmuls.
    """
    assert spec.width is not None
    return float(spec.width * _per_norm(spec, frozen)), 0.0 if frozen else float(spec.width)


def _outputs(spec: ModelSpec) -> tuple[float, float]:
    """Return elements per token in the outputs of a block's matmuls and attention, and of attention alone."""
    width, attention, keys = _widths(spec)
    up = _inner(spec) * (2 if spec.mlp == "swiglu" else 1)
    return attention + 2.0 * keys + attention + 2 * width + up, float(attention)


def _widths(spec: ModelSpec) -> tuple[int, int, int]:
    """Return the widths of the model, its queries and its keys."""
    assert spec.width is not None
    attention, heads = spec.attention_width or spec.width, spec.heads or 1
    return spec.width, attention, attention * (spec.kv_heads or heads) // heads
