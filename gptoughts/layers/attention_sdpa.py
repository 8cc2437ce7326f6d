"""Attention in one fused kernel: memory grows with T instead of T squared, and the scores never leave the chip.

Torch's `scaled_dot_product_attention` picks flash, cuDNN or memory-efficient attention by device and dtype. On a GPU the fused
kernels want half precision; in float32 the memory-efficient one runs. Source: Dao 2023, FlashAttention-2; torch's documentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gptoughts.layer import Case, Engine, Evidence, Layer, Options, Reason, Sight, active, cannot, inactive

# One operator per fused backend of torch 2.10 to 2.13; the math backend has another name, so that it can be told.
FUSED = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
FALLBACK = "_scaled_dot_product_attention_math"


def fits(case: Case, options: Options) -> Iterator[Reason]:
    """The family must offer its attention for replacement."""
    if case.facts.family is None:
        yield cannot("needs a model of a known family; a module of your own calls its attention itself")


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Hand every attention module torch's function."""
    undo = engine.family.set_attention(engine.bare, attend)
    yield
    undo()


def attend(query, key, value, causal: bool, mask=None, scale: float | None = None):  # type: ignore[no-untyped-def]  # torch is not known here
    """Attention over query B H T D, key B K S D, value B K S E with K heads shared by groups. Causal: queries are the last T positions.

    `mask` (bool, broadcastable to B 1 T S, True = may attend) says everything; `causal` is then not applied.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda and (query.dtype is torch.float32 or mask is not None):
        # On CUDA only flash attention takes grouped heads, in half precision and without a mask; copied heads keep the rest fused.
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


def verify(engine: Engine, sight: Sight, options: Options) -> Evidence:
    """One fused forward per block and micro-batch (two where activations are recomputed), and none written out."""
    forward = sum(
        op.calls
        for name, op in sight.operators.items()
        if name.startswith(tuple(f"aten::{n}" for n in FUSED)) and "backward" not in name
    )
    written_out = sight.calls(FALLBACK)
    wanted = sight.blocks * sight.micro_batches
    names = sorted({n for n in FUSED for name in sight.operators if name.startswith(f"aten::{n}")})
    if written_out or forward < wanted:
        return inactive(
            f"{forward} fused attentions in {wanted} block forwards, {written_out} fell back", fused=forward, expected=wanted
        )
    kind = ", ".join(name.removeprefix("_scaled_dot_product_") for name in names)
    return active(f"{forward} {kind} in {wanted} block forwards", fused=forward, expected=wanted)


LAYER = Layer(
    name="sdpa",
    slot="attention",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    fits=fits,
    changes_numerics=True,
    repeatable_on_gpu=False,
)
