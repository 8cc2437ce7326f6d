"""Flash attention over documents laid end to end: packed rows cost as much as their documents, and no mask exists.

Torch's own `varlen_attn` takes document bounds, counted once per forward, and runs the flash kernels of torch's wheel: no package to
install, and a custom operator, so compiled blocks stay one graph. It hurts where rows hold one document each: the same kernel then reads
bounds as well. Counting documents waits for the device once per forward, and compiled blocks are compiled again when the count passes
a power of two. Source: torch.nn.attention.varlen (torch 2.10 and later); Dao 2023, FlashAttention-2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gptoughts.config.tasks import task_of
from gptoughts.layers.support.requirements import HALF_PRECISION, VARIABLE_LENGTH_CLASHES, fixed_attention
from gptoughts.planning.kernel_names import attention_forwards, format_launches
from gptoughts.planning.layer import (
    Case,
    Engine,
    Evidence,
    Layer,
    Options,
    Reason,
    StepTrace,
    active,
    inactive,
    slower,
    unproven,
    unsupported,
)

OPERATOR = "torch_attn::_varlen_attn"
WIDEST_HEAD = 256


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """Flash attention's head widths, no padding masks, and documents that share rows."""
    spec, data = case.spec, case.recipe.data
    fixed = list(fixed_attention(case))
    yield from fixed
    if fixed:
        return
    if task_of(case.recipe).head != "causal":
        yield unsupported("question answering masks padding, which document bounds cannot express")
    if spec.head_dim is not None and spec.head_dim > WIDEST_HEAD:
        yield unsupported(f"flash attention takes heads of at most {WIDEST_HEAD}, the model has {spec.head_dim}")
    if data.format != "chat" or not data.packing:
        yield slower(
            "no documents share a row: sdpa runs the same kernel without bounds", "torch's documentation of varlen_attn"
        )


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Set the variable-length function on every attention module, and count documents per forward."""
    from gptoughts.models.gpt import flash

    undo = engine.family.set_attention(engine.bare, flash.torch_varlen(), "lengths")
    try:
        yield
    finally:
        undo()


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require one variable-length operator per block and micro-batch, each with torch's flash kernel."""
    wanted, operator, kernels = trace.attention_forwards, trace.operators.get(OPERATOR), attention_forwards(trace)
    calls = operator.calls if operator else 0
    text = f"{calls} variable-length attentions"
    if calls < wanted:
        return inactive(f"{text} in {trace.attention_label}; kernels: {format_launches(kernels)}", calls=calls)
    if not kernels:
        return unproven(f"{text}; the profiler saw no attention kernel")
    text = f"{text}, {format_launches(kernels)} kernels in {trace.attention_label}"
    wrong = kernels.get("flash", 0) < wanted or set(kernels) != {"flash"}
    return (inactive if wrong else active)(text, calls=calls)


LAYER = Layer(
    name="varlen",
    slot="attention",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=lambda case, options, budget: budget.without_scores(),
    unmet=unmet,
    needs_gpu=True,
    min_capability=(8, 0),
    needs_slots={"precision": HALF_PRECISION},
    clashes=VARIABLE_LENGTH_CLASHES,
    changes_numerics=True,
    repeatable_on_gpu=False,
)
