"""Attention that skips masked blocks: rows of many short documents cost as much as their documents, not the square of the row length.

Torch's flex_attention takes a mask in blocks of 128 tokens, made once per forward from the positions; fully masked blocks are not
computed, and no T x T mask exists. It supports packed chats, causal and bidirectional attention, grouped heads and narrower values. It
hurts where rows hold one document each: there `sdpa` runs hand-written kernels, and flex_attention reaches 90 % of their speed forward
and 85 % backward (PyTorch's blog on FlexAttention, against FlashAttention-2). On a GPU it is one Triton kernel, compiled once for all
blocks; on a CPU torch has no backward for the compiled form, so the unfused operator runs, which is correct and slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from gptoughts.errors import LayerError
from gptoughts.layers.support.requirements import capability, fixed_attention, triton
from gptoughts.models.torch_internals import is_compiled
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
    unsupported,
)

MIN_CAPABILITY = (8, 0)  # torch's own tests of flex_attention start there


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """A family with replaceable attention, Triton on a GPU, and documents that share rows."""
    data = case.recipe.data
    fixed = list(fixed_attention(case))
    yield from fixed
    if fixed:
        return
    if case.on_gpu:
        too_old = list(capability(case, MIN_CAPABILITY))
        yield from too_old
        if too_old:
            return
    yield from triton(case)
    if not case.on_gpu and case.preferred.get("compile") not in (None, "eager"):
        yield unsupported("torch has no backward of compiled flex_attention on a CPU", "--layer.compile eager")
    if not case.on_gpu and case.preferred.get("precision") not in (None, "fp32"):
        yield unsupported("on a CPU its matmuls are float32 whatever the precision", "--layer.precision fp32")
    if not case.on_gpu:
        yield slower("on a CPU it runs unfused, with all scores in memory", "torch: flex_attention's own warning")
    elif data.format != "chat" or not data.packing or case.recipe.objective != "next-token":
        yield slower(
            "no documents share a row: sdpa's hand-written kernels are faster",
            "PyTorch's blog on FlexAttention: 90 % of FlashAttention-2 forward, 85 % backward",
        )


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Set flex_attention on every attention module, and make block masks in the model."""
    from gptoughts.models.gpt import flex

    with ExitStack() as stack:
        stack.callback(engine.family.set_attention(engine.bare, flex.attend, "blocks"))
        if engine.device.type == "cpu":
            for hook in ("forward_context", "eval_context"):
                stack.callback(engine.wrap_context(hook, partial(_refuse_compiled, engine)))
        yield


@contextmanager
def _refuse_compiled(engine: Engine) -> Iterator[None]:
    """Raise LayerError for compiled modules: on a CPU torch compiles the forward of this operator but not its backward."""
    if any(is_compiled(module) for module in engine.bare.modules()):
        raise LayerError(
            "attention=flex: torch has no backward of compiled flex_attention on a CPU",
            fix="--layer.compile eager, or --layer.attention sdpa",
        )
    yield


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require one flex_attention per block and micro-batch: by kernel name on a GPU, by the unfused operator on a CPU."""
    from gptoughts.models.gpt.flex import OPERATOR

    wanted = trace.attention_forwards
    if engine.device.type == "cuda":
        ran = attention_forwards(trace)
        flex, kind = ran.get("flex", 0), "Triton kernels"
        others = {name: count for name, count in ran.items() if name != "flex"}
    else:
        operator = trace.operators.get(OPERATOR)
        flex, others, kind = operator.calls if operator else 0, {}, "unfused operators"
    if flex < wanted or others:
        beside = f"; {format_launches(others)} ran instead" if others else ""
        return inactive(f"{flex} flex_attention {kind} in {trace.attention_label}{beside}", flex=flex, expected=wanted)
    form = ", which write all scores (torch's form for training on a CPU)" if engine.device.type != "cuda" else ""
    return active(f"{flex} flex_attention {kind} in {trace.attention_label}{form}", flex=flex, expected=wanted)


LAYER = Layer(
    name="flex",
    slot="attention",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=lambda case, options, budget: budget.without_scores(),
    unmet=unmet,
    wraps=("forward_context", "eval_context"),
    changes_numerics=True,
    repeatable_on_gpu=False,
)
