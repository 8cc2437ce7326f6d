"""Keeps one activation per block and computes the rest again in the backward: memory falls with depth, a third more compute.

It buys a larger micro-batch or a longer context on a full GPU, and hurts wherever the activations would have fitted.
Source: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost; `torch.utils.checkpoint`, non-reentrant.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

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
from gptoughts.planning.memory_fit import SOURCE, room


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """Pays only where the activations of a micro-batch would not fit."""
    if case.spec.family is None:
        yield unsupported("needs a model of a known family, whose blocks are known before it is built")
        return
    if case.takes("precision", "fp8-te") and case.option("precision", "scaling") == "delayed":
        yield unsupported(
            "scales from a history have moved by the time that a block runs again", "--layer.precision.scaling current"
        )
    everything = room(case)
    if everything is not None and everything.is_enough:
        yield slower(f"weights, optimizer and activations take {everything}", SOURCE)


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """The inside of one block at a time, and every block's input."""
    return replace(budget, inner=0.0)


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Run each block's forward under a checkpoint while gradients are recorded."""
    import torch
    from torch.utils.checkpoint import checkpoint

    def checkpointed(forward):  # type: ignore[no-untyped-def]
        def run(*arguments, **keywords):  # type: ignore[no-untyped-def]
            if not torch.is_grad_enabled():
                return forward(*arguments, **keywords)
            return checkpoint(forward, *arguments, use_reentrant=False, **keywords)

        return run

    for block in engine.blocks.values():
        block.forward = checkpointed(block.forward)  # on the instance: the class and the parameter names stay
    yield
    for block in engine.blocks.values():
        del block.forward


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Attention ran forward twice per block and micro-batch. Hooks cannot tell under compile, operators can."""
    once = trace.blocks * trace.micro_batches
    ran = sum(op.calls for name, op in trace.operators.items() if _forward_attention(name))
    ran = ran or sum(attention_forwards(trace).values())  # kernels of packages are no operators of torch
    if ran == 0:  # attention written out: the softmax over scores stands for it
        ran = sum(op.calls for name, op in trace.operators.items() if name == "aten::_softmax")
    if ran == 0:
        return unproven("no attention operator to count: written-out attention was compiled away")
    if ran < 2 * once:
        return inactive(f"attention ran forward {ran} times, recomputation makes it {2 * once}", ran=ran, expected=2 * once)
    return active(f"attention ran forward {ran} times in {once} block forwards", ran=ran, expected=2 * once)


def _forward_attention(name: str) -> bool:
    # The public operator calls the backend's, whose name begins with an underscore: only that one is counted.
    return name.startswith("aten::_scaled_dot_product_") and "backward" not in name


LAYER = Layer(
    name="recompute-blocks",
    slot="recompute",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
)
