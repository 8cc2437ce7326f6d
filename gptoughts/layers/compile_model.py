"""The whole model compiled as one graph, embedding, head and loss included: fusion across block boundaries, one call per forward.

It hurts in compile time: blocks do not share a graph, so it grows with depth. With four blocks it took 1.35 times as long as
`compile-blocks` (docs/measurements/cpu/compile.json). With data parallelism all gradients are ready only at the end of the graph, so none
is exchanged during the backward. A forward that is not one graph is an error, not a slow path. Validation, and every other shape, has
its own graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
)

# Operators that exist only when called from Python: a graph decomposes or fuses them.
OF_PYTHON = (
    "aten::linear",
    "aten::embedding",
    "aten::layer_norm",
    "aten::rms_norm",
    "aten::scaled_dot_product_attention",
)
WHILE_COMPILING = "entire_frame_compile"


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """The compiler's requirements; a custom model may or may not be one graph, so it must be requested by name."""
    if case.spec.family is None:
        yield slower("a custom model may not compile to one graph", "no measurement")
    if case.world.world_size > 1:
        yield slower(
            "gradients are ready only at the end of the graph, so none is exchanged during the backward",
            "torch's notes on DDPOptimizer",
        )
    yield from unmet_by_compiler(case)


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Compile the model in place, which keeps parameter names."""
    from gptoughts.console import note
    from gptoughts.layers.support.compile import compiled

    with compiled(engine, LAYER.name, options["cache"], note):
        engine.bare.compile(fullgraph=True, dynamic=False)
        try:
            yield
        finally:
            undo_compile(engine.bare)


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require one compiled call per micro-batch, and no model operator outside of it."""
    from gptoughts.layers.support.compile import newest

    made, outside = newest(), sum(trace.operators[name].calls for name in OF_PYTHON if name in trace.operators)
    seen = f"{trace.regions} compiled calls in {trace.micro_batches} micro-batches, {outside} model operators outside"
    text = f"{seen}; {made.words()}" if made else seen
    figures = {"compiled": trace.regions, "outside": outside, **(made.figures if made else {})}
    if trace.regions < trace.micro_batches:
        return inactive(text, **figures)
    if outside and WHILE_COMPILING in trace.operators:
        return unproven(f"{text}; the watched step compiled, and its operators include those of tracing", **figures)
    return (inactive if outside else active)(text, **figures)


LAYER = Layer(
    name="compile-model",
    slot="compile",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=lambda case, options, budget: budget.compiled(),
    unmet=unmet,
    wraps=("forward_context", "eval_context", "backward", "step"),
    options={"cache": CACHE},
    compiles=True,
    clashes={
        "fp8-te": "Transformer Engine disables Dynamo for its modules, and the whole model must be one graph",
        "offload-activations": "its hooks do not see tensors that a graph saves for its backward",
        "in-backward": "one graph returns all gradients at once, which updates in the backward are meant to avoid",
    },
    changes_numerics=True,
    warmup_steps=1,
    measured="docs/measurements/cpu/compile.json on a CPU (compile time only); not measured on a GPU",
)
