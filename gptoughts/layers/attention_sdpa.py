"""Attention in one fused kernel: memory grows with T instead of T squared, and scores are never written to memory.

Torch's `scaled_dot_product_attention` picks flash, cuDNN or memory-efficient attention by device and dtype; `backend` restricts it to
one, and the evidence names the backend that ran. On a GPU flash and cuDNN need half precision; flash takes no mask, so documents that
share rows silently select the memory-efficient kernel: use `flex` or `varlen` for those. cuDNN's kernel is written for Hopper and later.
Sources: Dao 2023, FlashAttention-2; torch's documentation and aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

from gptoughts.config.tasks import FORMATS
from gptoughts.errors import LayerError
from gptoughts.layers.support.requirements import capability, fixed_attention
from gptoughts.planning.kernel_names import attention_forwards, format_launches
from gptoughts.planning.layer import (
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

# One operator per fused backend of torch 2.10 to 2.13; the math backend has a name of its own.
FUSED = {
    "flash": "_scaled_dot_product_flash_attention",
    "efficient": "_scaled_dot_product_efficient_attention",
    "cudnn": "_scaled_dot_product_cudnn_attention",
    "overrideable": "_scaled_dot_product_fused_attention_overrideable",
}
FALLBACK = "_scaled_dot_product_attention_math"
MIN_CAPABILITY = {"flash": (8, 0), "cudnn": (8, 0), "efficient": (5, 0)}
BACKENDS = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION"}
NO_KERNEL = ("No available kernel", "No viable backend")  # CUDA, CPU
INSIDE = {"fa2", "fa3", "fa4"}
"""Implementations that torch can run under the name flash (torch.nn.attention.activate_flash_attention_impl)."""


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """A family with replaceable attention; for a named backend also its hardware and masks."""
    fixed = list(fixed_attention(case))
    yield from fixed
    if fixed:
        return
    backend, anyhow = options["backend"], "--layer.attention.backend auto"
    if backend == "auto":
        return
    if not case.on_gpu:
        if backend != "flash":
            yield unsupported(f"torch has no {backend} attention for a CPU", remedy=anyhow)
        return
    too_old = [replace(reason, remedy=anyhow) for reason in capability(case, MIN_CAPABILITY[backend], f"backend {backend} ")]
    yield from too_old
    if backend == "flash" and not too_old and _masked(case):
        yield unsupported(
            "backend flash takes no mask, and these rows need one",
            remedy="--layer.attention varlen, flex, or sdpa with backend auto",
        )


def _masked(case: Case) -> bool:
    """Return whether rows need a mask: where documents share them, or padding that a bidirectional model would attend to."""
    recipe = case.recipe
    return FORMATS[recipe.data.format].is_padded and (recipe.data.packing or recipe.objective != "next-token")


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Set torch's function on every attention module, restricted to a backend if one is named."""
    from gptoughts.models.gpt.sdpa import attend, attend_with_backend

    backend = options["backend"]
    with ExitStack() as stack:
        chosen = attend if backend == "auto" else attend_with_backend(BACKENDS[backend])
        stack.callback(engine.family.set_attention(engine.bare, chosen))
        if backend != "auto":
            for hook in ("forward_context", "eval_context"):
                stack.callback(engine.wrap_context(hook, partial(_name_backend, backend)))
        yield


@contextmanager
def _name_backend(backend: str) -> Iterator[None]:
    """Turn torch's "no available kernel" into a LayerError that names the backend."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in NO_KERNEL):
            raise
        raise LayerError(
            f"attention=sdpa: torch's {backend} attention does not support this dtype, head width or mask",
            fix="--layer.attention.backend auto, or --layer.precision bf16",
        ) from error


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require one fused forward per block and micro-batch (two if activations are recomputed), and no math fallback.

    Counts operators, and on a GPU the kernels as well: a named backend must be the only one that ran.
    """
    ran = {kind: _forwards(trace, name) for kind, name in FUSED.items()}
    ran = {kind: count for kind, count in ran.items() if count}
    fused, fallbacks, wanted = sum(ran.values()), trace.calls(FALLBACK), trace.attention_forwards
    kernels, backend = attention_forwards(trace), options["backend"]
    beneath = f"; kernels: {format_launches(kernels)}" if kernels else ""
    if fallbacks or fused < wanted:
        text = f"{fused} fused attentions in {trace.attention_label}, {fallbacks} fell back{beneath}"
        return inactive(text, fused=fused, expected=wanted)
    text = f"{format_launches(ran)} in {trace.attention_label}{beneath}"
    if backend == "auto":
        return active(text, fused=fused, expected=wanted)
    allowed = {backend} | (INSIDE if backend == "flash" else set())
    if set(ran) != {backend} or not set(kernels) <= allowed:
        return inactive(f"requested {backend}, torch ran {text}", fused=ran.get(backend, 0), expected=wanted)
    if engine.device.type == "cuda" and sum(kernels.values()) < wanted:
        return unproven(f"{text}: {backend} by operators, too few kernels of that name", fused=fused, expected=wanted)
    return active(text, fused=fused, expected=wanted)


def _forwards(trace: StepTrace, name: str) -> int:
    return sum(op.calls for seen, op in trace.operators.items() if seen.startswith(f"aten::{name}") and "backward" not in seen)


LAYER = Layer(
    name="sdpa",
    slot="attention",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=lambda case, options, budget: budget.without_scores(),
    unmet=unmet,
    options={"backend": Option("auto", "torch kernel that must run", choices=("auto", *BACKENDS))},
    wraps=("forward_context", "eval_context"),
    changes_numerics=True,
    repeatable_on_gpu=False,
    measured="docs/measurements/cpu/layers.json on a CPU; not measured on a GPU",
)
