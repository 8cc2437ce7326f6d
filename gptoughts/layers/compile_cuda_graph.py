"""The whole model compiled and recorded as CUDA graphs: a forward is one launch and a backward another, with no wait for Python between.

It pays where kernels are so short that the host cannot launch them fast enough: small models, small micro-batches. It hurts in memory:
a graph keeps a pool of its own for all that it computes, and gradients lie beside it, not in it. Every shape is recorded again, and
validation has its own. Recording takes the first three steps.
Sources: torch's notes on CUDAGraph Trees; `torch.compile(mode="reduce-overhead")`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gptoughts.layers.support.compile import CACHE, lacking
from gptoughts.models.torch_internals import undo_compile
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

LAUNCH = "cudaGraphLaunch"


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """One process, and a model whose tensors live no longer than its forward."""
    spec = case.spec
    if case.world.world_size > 1:
        yield unsupported(
            "gradients are exchanged by hooks between kernels, and a recorded graph has no place for them; takes one process"
        )
    if spec.experts:
        yield unsupported(
            "the balance of experts is kept from one forward to the next, and a replayed graph writes over what it gave before"
        )
    if case.recipe.adapter.kind != "none" and case.recipe.adapter.base != "full":
        yield unsupported("four-bit weights are unpacked by kernels that the compiler does not see")
    yield slower("never compared with compiled blocks, so it is taken by name only", "no measurement")
    yield from lacking(case)


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """What is cheap is computed again in the backward."""
    return budget.compiled()


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Compile the model in place for recording, and say where every micro-batch begins: what the last one gave may be written over."""
    import torch

    from gptoughts.console import note
    from gptoughts.layers.support.compile import compiled

    @contextmanager
    def begun() -> Iterator[None]:
        torch.compiler.cudagraph_mark_step_begin()
        yield

    with compiled(engine, LAYER.name, options["cache"], note):
        undo = [engine.wrap_context(verb, begun) for verb in ("forward_context", "eval_context")]
        undo.append(engine.wrap("backward", lambda inner, loss: _outside_the_pool(engine, inner, loss)))
        engine.bare.compile(fullgraph=True, dynamic=False, mode="reduce-overhead")
        try:
            yield
        finally:
            undo_compile(engine.bare)
            for back in undo:
                back()


def _outside_the_pool(engine: Any, inner: Callable[[Any], None], loss: Any) -> None:
    """Gradients are added into tensors of our own. Autograd would keep the graph's own tensors, which the next replay writes over."""
    import torch

    for parameter in engine.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    inner(loss)


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Every micro-batch launched at least one recorded graph, and torch left no graph out. What it left out it names."""
    from gptoughts.layers.support.compile import newest

    made, launches = newest(), trace.operators[LAUNCH].calls if LAUNCH in trace.operators else 0
    if engine.device.type != "cuda":
        return inactive("the run is not on a GPU")
    text = f"{launches} launches of recorded graphs in {trace.micro_batches} micro-batches"
    figures = {"launches": launches, "compiled": trace.regions, **(made.figures if made else {})}
    if made is not None and figures.get("skips"):
        why = made.skipped[-1] if made.skipped else "torch did not say why; TORCH_LOGS=cudagraphs does"
        return inactive(f"{text}; {figures['skips']} graphs not recorded: {why}", **figures)
    if not trace.kernels and not launches:
        return unproven("the profiler saw no kernel and no launch", **figures)
    text = f"{text}; {made.words()}" if made else text
    return (inactive if launches < trace.micro_batches else active)(text, **figures)


LAYER = Layer(
    name="cuda-graph",
    slot="compile",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    needs_gpu=True,
    wraps=("forward_context", "eval_context", "backward", "step"),
    options={"cache": CACHE},
    clashes={
        "fp8-te": "Transformer Engine keeps its modules out of Dynamo's graphs, and the whole model must be one",
        "offload-activations": "copies to the host are issued by Python during the forward, and a replayed graph runs none",
        "in-backward": "a recorded backward runs no Python, and updates would come after it",
        "state-on-cpu": "weights come back from the host every step, and a replay must find nothing else changed by Python",
    },
    changes_numerics=True,
    warmup_steps=3,
)
