"""FlashAttention-4, written in CuTe's Python for Hopper and Blackwell: the kernel that Blackwell's attention is waited for.

Packed documents need no mask. Its kernels are compiled when first called, and it comes as a pre-release. It hurts where blocks are
compiled: its functions are no operators that torch.compile knows, so blocks run eagerly, which usually costs more than attention gains.
Source: Dao-AILab/flash-attention, flash_attn/cute (flash-attn-4 4.0.0b36: architectures, head widths, no operators of torch.library).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gptoughts.layers.support.flash_attention import HALF_PRECISION, limits, proof
from gptoughts.planning.layer import Budget, Case, Engine, Evidence, Layer, Options, Reason, StepTrace, unsupported

BLACKWELL = ((10, 0), (12, 0))
BLACKWELL_WIDEST = 128
BLACKWELL_MORE = (192, 256)
"""Head widths above 128 that its Blackwell kernels take: DeepSeek's 192 with values of 128, and 256."""
OPAQUE = "FlashAttention-4's functions are no operators that torch.compile knows, and it is asked for whole graphs"


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """The architectures that have its backward, and their head widths."""
    yield from limits(case)
    least, head = case.machine.min_capability(), case.spec.head_dim
    if least is not None and least >= (13, 0):
        yield unsupported(f"its backward is written for compute capability 9.x to 12.x, found {least[0]}.{least[1]}")
    on_blackwell = least is not None and BLACKWELL[0] <= least < BLACKWELL[1]
    if on_blackwell and head is not None and head > BLACKWELL_WIDEST and head not in BLACKWELL_MORE:
        yield unsupported(
            f"its Blackwell kernels have heads of at most {BLACKWELL_WIDEST}, or 192 or 256, the model has {head}"
        )


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """No scores are kept."""
    return budget.without_scores()


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Hand every attention module the package's functions, and the model what counts documents."""
    from gptoughts.models.gpt import flash

    undo = engine.family.set_attention(engine.bare, flash.attention("fa4"), "lengths")
    yield
    undo()


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Forward kernels whose names hold the module flash_attn.cute, as CuTe writes it."""
    return proof(trace, "fa4")


LAYER = Layer(
    name="fa4",
    slot="attention",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    packages=(("flash-attn-4", "flash-4"),),
    min_capability=(9, 0),
    needs_slots={"precision": HALF_PRECISION},
    clashes={"compile-blocks": OPAQUE, "compile-model": OPAQUE, "cuda-graph": OPAQUE},
    changes_numerics=True,
    repeatable_on_gpu=False,
)
