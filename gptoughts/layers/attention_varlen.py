"""Flash attention over documents laid end to end: packed rows cost what their documents cost, and no mask exists.

Torch's own `varlen_attn` gets the bounds of the documents, counted once per forward, and runs the flash kernels of torch's wheel: no
package to install, and a custom operator, so compiled blocks stay one graph. It hurts where rows hold one document each: then it is
the same kernel with bounds to read. Counting the documents waits for the device once per forward, and compiled blocks compile again
whenever the count passes a power of two. Source: torch.nn.attention.varlen (torch 2.10 and later); Dao 2023, FlashAttention-2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
    unproven,
    unsupported,
)

OPERATOR = "torch_attn::_varlen_attn"
WIDEST_HEAD = 256


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """Flash attention's hardware and head widths, and documents that share rows."""
    spec, data = case.spec, case.recipe.data
    if spec.family is None:
        yield unsupported("needs a model of a known family; a module of your own calls its attention itself")
        return
    if case.recipe.objective == "question-answering":
        yield unsupported("question answering hides padding with masks, which variable lengths cannot tell")
    if spec.head_dim is not None and spec.head_dim > WIDEST_HEAD:
        yield unsupported(f"flash attention has heads of at most {WIDEST_HEAD}, the model has {spec.head_dim}")
    if data.format != "chat" or not data.packing:
        yield slower(
            "no documents share a row: sdpa runs the same kernel without bounds", "torch's documentation of varlen_attn"
        )


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """No scores are kept."""
    return budget.without_scores()


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Hand every attention module the variable-length function, and the model what counts documents."""
    from gptoughts.models.gpt import flash

    undo = engine.family.set_attention(engine.bare, flash.torch_varlen(), "lengths")
    yield
    undo()


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """One variable-length operator per block and micro-batch, and torch's flash kernel behind each."""
    wanted, operator, kernels = trace.blocks * trace.micro_batches, trace.operators.get(OPERATOR), attention_forwards(trace)
    calls = operator.calls if operator else 0
    if calls < wanted:
        return inactive(f"{calls} variable-length attentions in {wanted} block forwards; {told(kernels)} ran", calls=calls)
    if not kernels:
        return unproven(f"{calls} variable-length attentions, and the profiler saw no kernel of attention")
    if kernels.get("flash", 0) < wanted or set(kernels) != {"flash"}:
        return inactive(
            f"{calls} variable-length attentions; their kernels: {told(kernels)} in {wanted} block forwards", calls=calls
        )
    return active(f"{calls} variable-length attentions, {told(kernels)} kernels in {wanted} block forwards", calls=calls)


LAYER = Layer(
    name="varlen",
    slot="attention",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    needs_gpu=True,
    min_capability=(8, 0),
    needs_slots={"precision": ("bf16", "fp16", "fp8-te", "fp8-torchao")},
    clashes={
        "compile-model": "the number of documents in a batch is data, and one graph of the whole model cannot hold its shape",
        "cuda-graph": "the number of documents in a batch is data, and a captured graph replays one shape",
    },
    changes_numerics=True,
    repeatable_on_gpu=False,
)
