"""The whole model compiled and recorded as CUDA graphs: one launch per forward and one per backward, without launch overhead between.

It helps where kernels are too short for the host to launch them fast enough: small models, small micro-batches. It hurts memory: each
graph keeps a private pool for its intermediates, and gradients are allocated outside it. Every shape is recorded separately, validation
included. Recording takes the first three steps.
Sources: torch's notes on CUDAGraph Trees; `torch.compile(mode="reduce-overhead")`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from gptoughts.layers.support.compile import CACHE, unmet_by_compiler
from gptoughts.models.torch_internals import undo_compile
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

LAUNCH = "cudaGraphLaunch"


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """One process, no state kept between forwards, and the compiler's requirements."""
    spec = case.spec
    if case.world.world_size > 1:
        yield unsupported("needs one process: gradient exchange runs in hooks, which a recorded graph does not contain")
    if spec.experts:
        yield unsupported("expert load statistics are kept across forwards, and a replayed graph overwrites its outputs")
    if case.recipe.adapter.kind != "none" and case.recipe.adapter.base != "full":
        yield unsupported("4-bit weights are unpacked by kernels that the compiler cannot trace")
    yield slower("not compared with compiled blocks; request it by name", "no measurement")
    yield from unmet_by_compiler(case)


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Compile the model in place, and mark the begin of every micro-batch, after which earlier outputs may be overwritten."""
    import torch

    from gptoughts.console import note
    from gptoughts.layers.support.compile import compiled

    @contextmanager
    def begun() -> Iterator[None]:
        torch.compiler.cudagraph_mark_step_begin()
        yield

    with compiled(engine, LAYER.name, options["cache"], note), ExitStack() as stack:
        for hook in ("forward_context", "eval_context"):
            stack.callback(engine.wrap_context(hook, begun))
        stack.callback(engine.wrap("backward", lambda inner, loss: _outside_the_pool(engine, inner, loss)))
        engine.bare.compile(fullgraph=True, dynamic=False, mode="reduce-overhead")
        try:
            yield
        finally:
            undo_compile(engine.bare)


def _outside_the_pool(engine: Any, inner: Callable[[Any], None], loss: Any) -> None:
    """Accumulate gradients into tensors outside the graph's pool. Autograd would keep pool tensors, which the next replay overwrites."""
    import torch

    for parameter in engine.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    inner(loss)


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require at least one graph launch per micro-batch, and no graph that torch skipped; skipped graphs are listed with the reason."""
    from gptoughts.layers.support.compile import newest

    made, launches = newest(), trace.operators[LAUNCH].calls if LAUNCH in trace.operators else 0
    if engine.device.type != "cuda":
        return inactive("the run is not on a GPU")
    text = f"{launches} launches of recorded graphs in {trace.micro_batches} micro-batches"
    figures = {"launches": launches, "compiled": trace.regions, **(made.figures if made else {})}
    if made is not None and figures.get("skips"):
        why = made.skipped[-1] if made.skipped else "no reason given; see TORCH_LOGS=cudagraphs"
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
    memory=lambda case, options, budget: budget.compiled(),
    unmet=unmet,
    needs_gpu=True,
    wraps=("forward_context", "eval_context", "backward", "step"),
    options={"cache": CACHE},
    compiles=True,
    clashes={
        "fp8-te": "Transformer Engine disables Dynamo for its modules, and the whole model must be one graph",
        "offload-activations": "copies to the host are issued from Python, which a replayed graph does not run",
        "in-backward": "updates are Python hooks, which a recorded backward does not run",
        "state-on-cpu": "weights are copied back from the host every step, outside the recorded graph",
    },
    changes_numerics=True,
    warmup_steps=3,
)
