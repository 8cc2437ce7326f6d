"""Attention that skips what documents cannot see: rows of many short documents cost what the documents cost, not the square of the row.

Torch's flex_attention takes a mask in blocks of 128 tokens, made once per forward from the positions; blocks that nobody sees are not
computed, and no T x T mask exists. It serves packed chats, both directions, grouped heads and narrower values alike. It hurts where
rows hold one document each: there `sdpa` runs hand-written kernels, and flex_attention reaches 90 % of their speed forward and 85 %
backward (PyTorch's blog on FlexAttention, against FlashAttention-2). On a GPU it is one Triton kernel, compiled once for all blocks; on
a CPU torch has no backward for the compiled form, so the unfused operator runs, which is right and slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from gptoughts.errors import LayerError
from gptoughts.models.torch_internals import is_compiled
from gptoughts.planning.kernel_names import attention_forwards, told
from gptoughts.planning.layer import (
    Budget,
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

LEAST = (8, 0)  # torch's own tests of flex_attention run from there on


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """A family with attention to be replaced, Triton on a GPU, and documents that share rows."""
    spec, data = case.spec, case.recipe.data
    if spec.family is None:
        yield unsupported("needs a model of a known family; a module of your own calls its attention itself")
        return
    least = case.machine.min_capability()
    if case.on_gpu and (least is None or least < LEAST):
        yield unsupported(f"needs compute capability 8.0, found {f'{least[0]}.{least[1]}' if least else 'unknown'}")
        return
    if case.on_gpu and "triton" not in case.machine.packages:
        yield unsupported("needs the package triton, not installed", remedy="pip install triton")
    if not case.on_gpu and case.wishes.get("compile") not in (None, "eager"):
        yield unsupported("on a CPU torch has no backward of compiled flex_attention", "--layer.compile eager")
    if not case.on_gpu and case.wishes.get("precision") not in (None, "fp32"):
        yield unsupported("on a CPU it multiplies in float32 whatever the precision is", "--layer.precision fp32")
    if not case.on_gpu:
        yield slower("on a CPU it trains in its unfused form, with all scores in memory", "torch: flex_attention's own warning")
    elif data.format != "chat" or not data.packing or case.recipe.objective != "next-token":
        yield slower(
            "no documents share a row, and sdpa's kernels are written by hand",
            "PyTorch's blog on FlexAttention: 90 % of FlashAttention-2 forward, 85 % backward",
        )


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """No scores are kept."""
    return budget.without_scores()


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Hand every attention module torch's flex_attention, and the model what makes masks of blocks."""
    from gptoughts.models.gpt import flex

    undo = [engine.family.set_attention(engine.bare, flex.attend, "blocks")]
    if engine.device.type == "cpu":
        undo += [engine.wrap_context(verb, partial(_eager, engine)) for verb in ("forward_context", "eval_context")]
    yield
    for back in reversed(undo):
        back()


@contextmanager
def _eager(engine: Engine) -> Iterator[None]:
    """On a CPU torch compiles this operator's forward and not its backward, and the compiler's own message says neither."""
    if any(is_compiled(module) for module in engine.bare.modules()):
        raise LayerError(
            "attention=flex: torch has no backward of compiled flex_attention on a CPU\n  try: --layer.compile eager, or --layer.attention sdpa"
        )
    yield


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """One flex_attention per block and micro-batch: by its kernel's name on a GPU, by the unfused operator's on a CPU."""
    from gptoughts.models.gpt.flex import OPERATOR

    wanted = trace.blocks * trace.micro_batches
    if engine.device.type == "cuda":
        ran = attention_forwards(trace)
        flex, kind = ran.get("flex", 0), "Triton kernels"
        others = {name: count for name, count in ran.items() if name != "flex"}
    else:
        operator = trace.operators.get(OPERATOR)
        flex, others, kind = operator.calls if operator else 0, {}, "unfused operators"
    if flex < wanted or others:
        beside = f"; {told(others)} ran instead" if others else ""
        return inactive(f"{flex} flex_attention {kind} in {wanted} block forwards{beside}", flex=flex, expected=wanted)
    form = ", which write all scores: torch's form for training on a CPU" if engine.device.type != "cuda" else ""
    return active(f"{flex} flex_attention {kind} in {wanted} block forwards{form}", flex=flex, expected=wanted)


LAYER = Layer(
    name="flex",
    slot="attention",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    wraps=("forward_context", "eval_context"),
    changes_numerics=True,
    repeatable_on_gpu=False,
)
