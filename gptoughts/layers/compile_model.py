"""The whole model compiled as one graph, embedding, head and loss included: fusions across the borders of blocks, one call a forward.

It hurts where compilation does: equal blocks do not share one graph here, so its time grows with depth. With four blocks it took 1.35
times what `compile-blocks` took (docs/measurements/cpu/compile.json). Data parallelism gets every gradient at the graph's end and can
exchange none of them during the backward. A forward that is not one graph is an error, not a slow path. Validation, and every other
shape, has a graph of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
)

# Operators that exist only where Python calls them: in a graph they are taken apart, or are part of a kernel.
OF_PYTHON = (
    "aten::linear",
    "aten::embedding",
    "aten::layer_norm",
    "aten::rms_norm",
    "aten::scaled_dot_product_attention",
)
WHILE_COMPILING = "entire_frame_compile"


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """As for blocks; a model of one's own may be one graph or not, and is tried where it is asked for by name."""
    if case.spec.family is None:
        yield slower("whether a model of your own is one graph is not known before it is tried", "no measurement")
    if case.world.world_size > 1:
        yield slower(
            "one graph has no gradient before its end, so none is exchanged during the backward",
            "torch's notes on DDPOptimizer",
        )
    yield from lacking(case)


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """What is cheap is computed again in the backward."""
    return budget.compiled()


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Compile the model in place, which keeps parameter names as they are."""
    from gptoughts.console import note
    from gptoughts.layers.support.compile import compiled

    with compiled(engine, LAYER.name, options["cache"], note):
        engine.bare.compile(fullgraph=True, dynamic=False)
        try:
            yield
        finally:
            undo_compile(engine.bare)


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """One compiled call a micro-batch, and none of the operators of a model ran outside."""
    from gptoughts.layers.support.compile import newest

    made, outside = newest(), sum(trace.operators[name].calls for name in OF_PYTHON if name in trace.operators)
    seen = f"{trace.regions} compiled calls in {trace.micro_batches} micro-batches, {outside} operators of the model outside"
    text = f"{seen}; {made.words()}" if made else seen
    figures = {"compiled": trace.regions, "outside": outside, **(made.figures if made else {})}
    if trace.regions < trace.micro_batches:
        return inactive(text, **figures)
    if outside and WHILE_COMPILING in trace.operators:
        return unproven(f"{text}; the watched step compiled, and what that tries out is among its operators", **figures)
    return (inactive if outside else active)(text, **figures)


LAYER = Layer(
    name="compile-model",
    slot="compile",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    wraps=("forward_context", "eval_context", "backward", "step"),
    options={"cache": CACHE},
    clashes={
        "fp8-te": "Transformer Engine keeps its modules out of Dynamo's graphs, and the whole model must be one",
        "offload-activations": "its hooks see nothing of what one graph saves for its backward",
        "in-backward": "one graph has all gradients at once, which updating them in the backward is there to avoid",
    },
    changes_numerics=True,
    warmup_steps=1,
    measured="docs/measurements/cpu/compile.json on a CPU (compile time only); not measured on a GPU",
)
