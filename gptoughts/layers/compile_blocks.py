"""Each block compiled into fused kernels, one graph for all blocks: fewer launches and less memory traffic.

The first step takes from ten seconds to a minute, again for every new shape; graphs are cached in ~/.cache/gptoughts/compiled, writable
by the user only, and reused by the next start. It hurts on short runs: on a CPU a GPT-2 style model saves a few per cent of a step, a
modern one (RMSNorm, rotary, SwiGLU) a quarter. Always `fullgraph=True, dynamic=False`: code that cannot be compiled is an error, not a
slow path. Recompilations are listed with their cause in the evidence and in the log.
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
    unsupported,
)


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """A known family with repeated blocks, and the compiler's requirements."""
    spec = case.spec
    if spec.family is None:
        yield unsupported("needs a model of a known family, whose blocks compile to one graph")
    elif case.recipe.model.family == "hf" and spec.depth == 1:
        yield unsupported("the model has one block, and only blocks are compiled")
    else:
        yield from unmet_by_compiler(case)


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Compile each block in place, which keeps parameter names. Compiler failures become one LayerError."""
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
    """Require a compiled call for every block forward: past the recompile limit torch runs blocks eagerly without a warning."""
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
    memory=lambda case, options, budget: budget.compiled(),
    unmet=unmet,
    wraps=("forward_context", "eval_context", "backward", "step"),
    options={"cache": CACHE},
    compiles=True,
    changes_numerics=True,
    warmup_steps=1,
    measured="docs/measurements/cpu/widths.json, compile.json and layers.json on a CPU; not measured on a GPU",
)
