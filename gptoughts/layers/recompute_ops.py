"""Keeps the outputs of matmuls and attention, and recomputes norms, activation functions and rotary positions in the backward.

Saves about a third of the activations for a few per cent of compute, where `recompute-blocks` saves most of them for a third more (a
tiny GPT in float32 keeps 61 % of all bytes, whole blocks 27 %, logits included: tests/layers/test_memory_layers.py). `keep = "attention"`
keeps only attention outputs: nearly as little memory as whole blocks (30 %), without a second attention forward. It hurts where
activations fit anyway, and in eager mode, where every operator of a block passes through Python. For compiled blocks the compiler gets
the same policy and decides the rest. Gradients are bit-identical. Its gain on a GPU was not measured.
Source: Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models; torch's
`create_selective_checkpoint_contexts`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from gptoughts.layers.support.recomputation import until_last_projection
from gptoughts.layers.support.requirements import fixed_scales
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
from gptoughts.planning.memory_fit import SOURCE, memory_headroom

# Operator names without overload. Products of two activations (bmm) are excluded: unfused attention makes T x T of them.
PRODUCT_NAMES = ("aten::mm", "aten::addmm", "aten::_scaled_mm", "aten::_grouped_mm", "aten::_scaled_grouped_mm")
ATTENTION_PARTS = ("scaled_dot_product", "flash_attn", "flex_attention", "varlen_attn")
CHEAP = (
    "aten::silu", "aten::gelu", "aten::relu", "aten::tanh", "aten::rsqrt", "aten::rms_norm", "aten::_fused_rms_norm",
    "aten::layer_norm", "aten::native_layer_norm",
)  # fmt: skip
MARK, KEPT, AGAIN = "recompute-ops", "recompute-ops: kept", "recompute-ops: kept and run again"


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """A known family, and activations that do not fit unless some are recomputed."""
    if case.spec.family is None:
        yield unsupported("needs a model of a known family, with known blocks")
        return
    yield from fixed_scales(case)
    if options["keep"] == "attention" and case.takes("attention", "math"):
        yield unsupported("unfused attention is not one operator whose output can be kept", "--layer.attention sdpa")
        return
    everything = memory_headroom(case)
    kept = memory_headroom(case, lambda budget: memory(case, options, budget))
    if everything is None or kept is None:
        return
    if everything.is_enough:
        yield slower(f"weights, optimizer and activations take {everything}", SOURCE)
    elif not kept.is_enough:
        yield slower(f"kept activations still take {kept}: recompute-blocks keeps less", SOURCE)


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """Outputs of matmuls and attention, and every block's input."""
    return budget.only(budget.products if options["keep"] == "matmuls" else budget.mixed)


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Checkpoint each block's forward, keeping the outputs of some operators."""
    for block in engine.blocks.values():
        block.forward = _checkpointed(block.forward, options["keep"], engine.counters.call_counts)
    try:
        yield
    finally:
        for block in engine.blocks.values():
            del block.forward


def _checkpointed(forward: Callable[..., Any], keep: str, call_counts: Counter[str]) -> Callable[..., Any]:
    """Return `forward` with selective checkpointing. Counts its runs: one when called, one in the backward."""
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
        if torch.compiler.is_compiling():  # a changing count would recompile the block at every step
            return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts, **keywords)
        return checkpoint(counted, *arguments, use_reentrant=False, context_fn=watched_contexts, **keywords)

    return run


@contextmanager
def _both(outer: Any, inner: Any) -> Iterator[None]:
    with outer, inner:
        yield


def _counting(keep: str, call_counts: Counter[str]) -> Any:
    """Return a dispatch mode outside that of the recomputation, which counts kept operators that run again.

    The profiler cannot tell on a CPU: it records an operator before the mode that returns its saved output.
    """

    class Ran(dispatch_mode()):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            call_counts[AGAIN] += is_kept(func.name(), keep)
            return func(*args, **(kwargs or {}))

    return Ran()


@cache
def is_kept(name: str, keep: str) -> bool:
    """Return whether the output of operator `name` (`aten::mm.default`, or a higher-order one without a dot) is kept."""
    bare = name.partition(".")[0]
    if any(part in bare for part in ATTENTION_PARTS):
        return True
    return keep == "matmuls" and (bare in PRODUCT_NAMES or f"aten::{bare}" in PRODUCT_NAMES)


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require two runs of every block and its cheap operators, and one of kept operators; compiled blocks prove only the policy."""
    once = trace.blocks * trace.micro_batches
    ran, kept, again = (trace.call_counts.get(mark, 0) for mark in (MARK, KEPT, AGAIN))
    cheap = max((trace.operators[name].calls for name in CHEAP if name in trace.operators), default=0)
    figures = {"ran": ran, "expected": 2 * once, "kept": kept, "again": again, "cheap": cheap}
    if not ran and trace.regions >= once > 0 and engine.counters.call_counts[KEPT]:
        return unproven(
            f"{trace.regions} compiled calls in {once} block forwards; policy keep={options['keep']} was traced, recomputation inside "
            "the graph is not visible",
            **figures,
        )
    if not ran or ran < 2 * once:
        return inactive(f"{ran} block runs, expected {2 * once} with recomputation", **figures)
    if kept < min(once, trace.attention_forwards) or again:  # a hybrid has attention in some blocks only
        return inactive(f"{kept} outputs kept in {once} block forwards, {again} kept operators ran again", **figures)
    if cheap < 2 * once:
        return inactive(f"no norm or activation function was recomputed: {cheap} calls in {once} block forwards", **figures)
    return active(f"{once} block forwards ran twice; {kept} outputs kept, 0 kept operators ran again", **figures)


LAYER = Layer(
    name="recompute-ops",
    slot="recompute",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    recomputes=lambda spec, options: (0.0 if options["keep"] == "matmuls" else until_last_projection(spec), 0.0),
    unmet=unmet,
    memory_rank=20,
    options={"keep": Option("matmuls", "outputs that are kept; attention outputs always are", str, ("matmuls", "attention"))},
)
