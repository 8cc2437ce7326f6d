"""FlashAttention-2 from its own package: torch's fused attention, and packed documents without a mask.

`sdpa` has the same kernels inside torch, so on rows of one document each nothing is gained; where documents share rows, `sdpa` falls
back to a slower kernel with a dense mask and this one does not. It hurts on Hopper, where it reaches about a third of the peak, and its
package is compiled for an hour where no wheel fits. Compiled blocks stay one graph: the package registers its operators with torch.
Sources: Dao 2023 (arXiv:2307.08691); Shah et al. 2024 (arXiv:2407.08608), 35 % of an H100's peak.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gptoughts.layers.support.flash_attention import HALF_PRECISION, limits, proof
from gptoughts.planning.layer import Budget, Case, Engine, Evidence, Layer, Options, Reason, StepTrace, slower


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """What FlashAttention takes; it pays where documents share rows, on GPUs before Hopper."""
    yield from limits(case)
    least, data = case.machine.min_capability(), case.recipe.data
    if least is not None and least >= (9, 0):
        yield slower("from compute capability 9.0 on it leaves most of the GPU idle", "Shah et al. 2024: 35 % of an H100")
    elif data.format != "chat" or not data.packing:
        yield slower("no documents share a row: sdpa has the same kernels", "torch.nn.attention: FlashAttention-2 inside")


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """No scores are kept."""
    return budget.without_scores()


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Hand every attention module the package's functions, and the model what counts documents."""
    from gptoughts.models.gpt import flash

    undo = engine.family.set_attention(engine.bare, flash.attention("fa2"), "lengths")
    yield
    undo()


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """The package's own forward kernels, which are not those of the same name in torch."""
    return proof(trace, "fa2")


LAYER = Layer(
    name="fa2",
    slot="attention",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    packages=(("flash-attn", "flash"),),
    min_capability=(8, 0),
    needs_slots={"precision": HALF_PRECISION},
    clashes={
        "compile-model": "the number of documents in a batch is data, and one graph of the whole model cannot hold its shape",
        "cuda-graph": "the number of documents in a batch is data, and a captured graph replays one shape",
    },
    changes_numerics=True,
    repeatable_on_gpu=False,
)
