"""Attention in one fused kernel: memory grows with T instead of T squared, and the scores never leave the chip.

Torch's `scaled_dot_product_attention` picks flash, cuDNN or memory-efficient attention by device and dtype; `backend` holds it to one,
and what ran is named in the evidence either way. On a GPU flash and cuDNN want half precision; flash takes no mask, so documents that
share rows silently send it to the memory-efficient kernel: `flex` and `varlen` are for those. cuDNN's is written for Hopper and later.
Sources: Dao 2023, FlashAttention-2; torch's documentation and aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from gptoughts.errors import LayerError
from gptoughts.planning.kernel_names import attention_forwards, told
from gptoughts.planning.layer import (
    Budget,
    Case,
    Engine,
    Evidence,
    Layer,
    Option,
    Options,
    Reason,
    StepTrace,
    active,
    inactive,
    unproven,
    unsupported,
)

# One operator per fused backend of torch 2.10 to 2.13; the math backend has another name, so that it can be told.
FUSED = {
    "flash": "_scaled_dot_product_flash_attention",
    "efficient": "_scaled_dot_product_efficient_attention",
    "cudnn": "_scaled_dot_product_cudnn_attention",
    "overrideable": "_scaled_dot_product_fused_attention_overrideable",
}
FALLBACK = "_scaled_dot_product_attention_math"
LEAST = {"flash": (8, 0), "cudnn": (8, 0), "efficient": (5, 0)}
BACKENDS = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION"}
NO_KERNEL = ("No available kernel", "No viable backend")  # CUDA, CPU
INSIDE = {"fa2", "fa3", "fa4"}
"""Implementations that torch can be told to run under the name of flash (torch.nn.attention.activate_flash_attention_impl)."""


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """The family must offer its attention for replacement, and the hardware and masks suit a backend that was named."""
    if case.spec.family is None:
        yield unsupported("needs a model of a known family; a module of your own calls its attention itself")
        return
    backend, anyhow = options["backend"], "--layer.attention.backend auto"
    if backend == "auto":
        return
    if not case.on_gpu:
        if backend != "flash":
            yield unsupported(f"torch has no {backend} attention for a CPU", remedy=anyhow)
        return
    least, wanted = case.machine.min_capability(), LEAST[backend]
    if least is None or least < wanted:
        found = f"{least[0]}.{least[1]}" if least else "unknown"
        yield unsupported(f"backend {backend} needs compute capability {wanted[0]}.{wanted[1]}, found {found}", remedy=anyhow)
    masked = case.recipe.data.format in ("chat", "squad")
    if backend == "flash" and masked:
        yield unsupported(
            "backend flash takes no mask, and these rows need one",
            remedy="--layer.attention varlen, flex, or sdpa with backend auto",
        )


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """No scores are kept."""
    return budget.without_scores()


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Hand every attention module torch's function, held to a backend where one was named."""
    from gptoughts.models.gpt.sdpa import attend, held

    backend = options["backend"]
    if backend == "auto":
        undo = [engine.family.set_attention(engine.bare, attend)]
    else:
        undo = [engine.family.set_attention(engine.bare, held(BACKENDS[backend]))]
        undo += [engine.wrap_context(verb, partial(_telling, backend)) for verb in ("forward_context", "eval_context")]
    yield
    for back in reversed(undo):
        back()


@contextmanager
def _telling(backend: str) -> Iterator[None]:
    """Torch says only that no kernel was available; say for which backend, and what to type."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in NO_KERNEL):
            raise
        raise LayerError(
            f"attention=sdpa: torch's {backend} attention takes no inputs of this dtype, width or mask\n"
            "  try: --layer.attention.backend auto, or --layer.precision bf16"
        ) from error


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """One fused forward per block and micro-batch (two where activations are recomputed), and none written out.

    By operator, and on a GPU by the kernels behind them too: a named backend must be the only one that ran.
    """
    ran = {kind: _forwards(trace, name) for kind, name in FUSED.items()}
    ran = {kind: count for kind, count in ran.items() if count}
    fused, written_out, wanted = sum(ran.values()), trace.calls(FALLBACK), trace.blocks * trace.micro_batches
    kernels, backend = attention_forwards(trace), options["backend"]
    beneath = f"; kernels: {told(kernels)}" if kernels else ""
    if written_out or fused < wanted:
        text = f"{fused} fused attentions in {wanted} block forwards, {written_out} fell back{beneath}"
        return inactive(text, fused=fused, expected=wanted)
    text = f"{told(ran)} in {wanted} block forwards{beneath}"
    if backend == "auto":
        return active(text, fused=fused, expected=wanted)
    allowed = {backend} | (INSIDE if backend == "flash" else set())
    if set(ran) != {backend} or not set(kernels) <= allowed:
        return inactive(f"{backend} was asked for, and torch ran {text}", fused=ran.get(backend, 0), expected=wanted)
    if engine.device.type == "cuda" and sum(kernels.values()) < wanted:
        return unproven(f"{text}: by its operators {backend}, and too few kernels have its name", fused=fused, expected=wanted)
    return active(text, fused=fused, expected=wanted)


def _forwards(trace: StepTrace, name: str) -> int:
    return sum(op.calls for seen, op in trace.operators.items() if seen.startswith(f"aten::{name}") and "backward" not in seen)


LAYER = Layer(
    name="sdpa",
    slot="attention",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    options={"backend": Option("auto", "which of torch's kernels must run", choices=("auto", *BACKENDS))},
    wraps=("forward_context", "eval_context"),
    changes_numerics=True,
    repeatable_on_gpu=False,
    measured="docs/measurements/cpu/layers.json on a CPU; not measured on a GPU",
)
