"""Keeps what is dear to compute again, the outputs of matmuls and attention, and computes norms, activations and rotary again.

Takes about a third off the activations for a few per cent of the work, where `recompute-blocks` takes most of them for a third more (a
tiny GPT in float32 keeps 61 % of all bytes, whole blocks 27 %, logits included: tests/layers/test_memory_layers.py). `keep = "attention"` keeps
only attention's outputs: nearly as little memory as whole blocks (30 %), without attention's second forward. It hurts where the
activations would have fitted, and in eager mode, where every operator of a block passes through Python. Compiled blocks are told the same
and decide the rest themselves. The gradient is bit for bit the same. What it gains on a GPU was not measured.
Source: Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models; torch's
`create_selective_checkpoint_contexts`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from gptoughts.models.torch_internals import dispatch_mode
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
    slower,
    unproven,
    unsupported,
)
from gptoughts.planning.memory_fit import SOURCE, room

# By the operator's name without its overload. Products of two activations (bmm) are left out: attention written out makes T x T of them.
PRODUCT_NAMES = ("aten::mm", "aten::addmm", "aten::_scaled_mm", "aten::_grouped_mm", "aten::_scaled_grouped_mm")
ATTENTION_PARTS = ("scaled_dot_product", "flash_attn", "flex_attention", "varlen_attn")
CHEAP = (
    "aten::silu", "aten::gelu", "aten::relu", "aten::tanh", "aten::rsqrt", "aten::rms_norm", "aten::_fused_rms_norm",
    "aten::layer_norm", "aten::native_layer_norm",
)  # fmt: skip
MARK, KEPT, AGAIN = "recompute-ops", "recompute-ops: kept", "recompute-ops: kept and run again"


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """Pays where all activations would not fit and what is kept does."""
    if case.spec.family is None:
        yield unsupported("needs a model of a known family, whose blocks are known before it is built")
        return
    if case.takes("precision", "fp8-te") and case.option("precision", "scaling") == "delayed":
        yield unsupported(
            "scales from a history have moved by the time that a block runs again", "--layer.precision.scaling current"
        )
    if options["keep"] == "attention" and case.takes("attention", "math"):
        yield unsupported("attention written out is no operator that could be kept", "--layer.attention sdpa")
        return
    everything = room(case)
    kept = room(case, lambda budget: memory(case, options, budget))
    if everything is None or kept is None:
        return
    if everything.is_enough:
        yield slower(f"weights, optimizer and activations take {everything}", SOURCE)
    elif not kept.is_enough:
        yield slower(f"what it keeps still takes {kept}: recompute-blocks keeps less", SOURCE)


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """What is kept are outputs of matmuls and attention, and every block's input."""
    return budget.only(budget.products if options["keep"] == "matmuls" else budget.mixed)


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Run each block's forward under a checkpoint that keeps the outputs of some operators."""
    for block in engine.blocks.values():
        block.forward = _checkpointed(block.forward, options["keep"], engine.counters.call_counts)
    yield
    for block in engine.blocks.values():
        del block.forward


def _checkpointed(forward: Callable[..., Any], keep: str, call_counts: Counter[str]) -> Callable[..., Any]:
    """`forward` while gradients are recorded, counted each time that Python runs it: once as it is called, once for the backward."""
    import torch
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    ran_again = _counting(keep, call_counts)

    def policy(context: Any, operator: Any, *arguments: Any, **keywords: Any) -> Any:
        if not is_kept(operator.name(), keep):
            return CheckpointPolicy.PREFER_RECOMPUTE
        call_counts[KEPT] += not context.is_recompute
        return CheckpointPolicy.MUST_SAVE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)

    def watched_contexts() -> Any:
        first, second = contexts()
        return first, _both(ran_again, second)

    def counted(*arguments: Any, **keywords: Any) -> Any:
        call_counts[MARK] += 1
        return forward(*arguments, **keywords)

    def run(*arguments: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **keywords)
        if torch.compiler.is_compiling():  # a count that changes would compile the block again at every step
            return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts, **keywords)
        return checkpoint(counted, *arguments, use_reentrant=False, context_fn=watched_contexts, **keywords)

    return run


@contextmanager
def _both(outer: Any, inner: Any) -> Iterator[None]:
    with outer, inner:
        yield


def _counting(keep: str, call_counts: Counter[str]) -> Any:
    """A mode that stands around that of the backward's pass and sees the operators which that one does not answer from memory.

    The profiler cannot tell the two apart on a CPU: it records an operator before the mode that answers it.
    """

    class Ran(dispatch_mode()):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            call_counts[AGAIN] += is_kept(func.name(), keep)
            return func(*args, **(kwargs or {}))

    return Ran()


@cache
def is_kept(name: str, keep: str) -> bool:
    """Whether the output of the operator `name` (`aten::mm.default`, or a higher-order one without a dot) is kept."""
    bare = name.partition(".")[0]
    if any(part in bare for part in ATTENTION_PARTS):
        return True
    return keep == "matmuls" and (bare in PRODUCT_NAMES or f"aten::{bare}" in PRODUCT_NAMES)


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Every block ran twice, its cheap operators with it, and none that is kept. Of compiled blocks only that the compiler was told."""
    once = trace.blocks * trace.micro_batches
    ran, kept, again = (trace.call_counts.get(mark, 0) for mark in (MARK, KEPT, AGAIN))
    cheap = max((trace.operators[name].calls for name in CHEAP if name in trace.operators), default=0)
    figures = {"ran": ran, "expected": 2 * once, "kept": kept, "again": again, "cheap": cheap}
    if not ran and trace.regions >= once > 0 and engine.counters.call_counts[KEPT]:
        return unproven(
            f"{trace.regions} compiled calls in {once} block forwards; the compiler was told to keep {options['keep']}, and only its graph "
            "knows what it computes again",
            **figures,
        )
    if not ran or ran < 2 * once:
        return inactive(f"blocks ran {ran} times, recomputation makes it {2 * once}", **figures)
    if kept < once or again:
        return inactive(f"{kept} outputs kept in {once} block forwards, {again} of such operators ran again", **figures)
    if cheap < 2 * once:
        return inactive(f"no norm or activation ran twice in {once} block forwards, {cheap} at most", **figures)
    return active(
        f"{once} block forwards ran twice; {kept} outputs were kept, and none of their operators ran again", **figures
    )


LAYER = Layer(
    name="recompute-ops",
    slot="recompute",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    options={
        "keep": Option(
            "matmuls", "what is not computed again; attention's outputs in either case", str, ("matmuls", "attention")
        )
    },
)
