"""Keeps one activation per block and recomputes the rest in the backward: far less activation memory, a third more compute.

It allows a larger micro-batch or a longer context on a full GPU, and hurts where activations fit anyway.
Source: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost; `torch.utils.checkpoint`, non-reentrant.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from gptoughts.layers.support.recomputation import until_last_projection
from gptoughts.layers.support.requirements import fixed_scales
from gptoughts.planning.kernel_names import attention_forwards
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
from gptoughts.planning.memory_fit import SOURCE, memory_headroom


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """A known family, and activations that do not fit."""
    if case.spec.family is None:
        yield unsupported("needs a model of a known family, with known blocks")
        return
    yield from fixed_scales(case)
    everything = memory_headroom(case)
    if everything is not None and everything.is_enough:
        yield slower(f"weights, optimizer and activations take {everything}", SOURCE)


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """The inside of one block at a time, and every block's input."""
    return replace(budget, inner=0.0, recasts=True)


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Checkpoint each block's forward while gradients are recorded."""
    import torch
    from torch.utils.checkpoint import checkpoint

    def checkpointed(forward):  # type: ignore[no-untyped-def]
        def run(*arguments, **keywords):  # type: ignore[no-untyped-def]
            if not torch.is_grad_enabled():
                return forward(*arguments, **keywords)
            return checkpoint(forward, *arguments, use_reentrant=False, **keywords)

        return run

    for block in engine.blocks.values():
        block.forward = checkpointed(block.forward)  # on the instance: class and parameter names do not change
    try:
        yield
    finally:
        for block in engine.blocks.values():
            del block.forward


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require two attention forwards per block and micro-batch, counted by operators, which compilation keeps."""
    once = trace.blocks * trace.micro_batches
    ran = sum(op.calls for name, op in trace.operators.items() if _forward_attention(name))
    ran = ran or sum(attention_forwards(trace).values())  # attention packages have kernels, not torch operators
    if ran == 0:  # unfused attention: count its softmax
        ran = sum(op.calls for name, op in trace.operators.items() if name == "aten::_softmax")
    if ran == 0:
        return unproven("no attention operator to count: unfused attention was compiled away")
    if ran < 2 * once:
        return inactive(f"{ran} attention forwards, expected {2 * once} with recomputation", ran=ran, expected=2 * once)
    return active(f"{ran} attention forwards in {once} block forwards", ran=ran, expected=2 * once)


def _forward_attention(name: str) -> bool:
    # The public operator calls the backend's, which begins with an underscore: count only that one.
    return name.startswith("aten::_scaled_dot_product_") and "backward" not in name


LAYER = Layer(
    name="recompute-blocks",
    slot="recompute",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    recomputes=lambda spec, options: (until_last_projection(spec), 1.0),
    unmet=unmet,
    memory_rank=40,
)
