"""Each block compiled into fused kernels, one graph for all blocks: fewer launches and less memory traffic.

The first step takes from ten seconds to a minute, again for every new shape; graphs are kept in ~/.cache/gptoughts/compiled, which only
you can write, and a second start reads them. It hurts on short runs: on a CPU a model of GPT-2's form saves a few per cent of a step,
the modern form a quarter. `fullgraph=True, dynamic=False`, always: a part that cannot be compiled is an error, not a slow path. A
graph that must be made again is named with its cause, in the evidence and later in the log.
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
    unsupported,
)


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """Inductor needs a C++ compiler on a CPU and Triton on a GPU; on a CPU the run must be long enough to earn the compilation."""
    spec = case.spec
    if spec.family is None:
        yield unsupported("needs a model of a known family, whose blocks are known to be one graph")
    elif case.recipe.model.family == "hf" and spec.depth == 1:
        yield unsupported("one block is no repeated one, and the rest of the model is not compiled")
    else:
        yield from lacking(case)


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """What is cheap is computed again in the backward."""
    return budget.compiled()


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Compile each block in place, which keeps parameter names as they are. What the compiler cannot do is told in one message."""
    from gptoughts.console import note
    from gptoughts.layers.support.compile import compiled

    with compiled(engine, LAYER.name, options["cache"], note):
        for block in engine.blocks.values():
            block.compile(fullgraph=True, dynamic=False)
        try:
            yield
        finally:
            for block in engine.blocks.values():
                undo_compile(block)


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Every forward of every block was a call of a compiled region. A full cache leaves blocks eager without a word: this counts."""
    from gptoughts.layers.support.compile import newest

    wanted, made = trace.blocks * trace.micro_batches, newest()
    if trace.blocks == 0:
        return inactive("the model has no blocks to compile")
    seen = f"{trace.regions} compiled calls in {wanted} block forwards"
    figures = {"compiled": trace.regions, "expected": wanted, **(made.figures if made else {})}
    text = f"{seen}; {made.words()}" if made else seen
    return (inactive if trace.regions < wanted else active)(text, **figures)


LAYER = Layer(
    name="compile-blocks",
    slot="compile",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    wraps=("forward_context", "eval_context", "backward", "step"),
    options={"cache": CACHE},
    changes_numerics=True,
    warmup_steps=1,
    measured="docs/measurements/cpu/widths.json, compile.json and layers.json on a CPU; not measured on a GPU",
)
