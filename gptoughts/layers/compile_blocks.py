"""Each block compiled into fused kernels, one graph for all blocks: fewer launches and less memory traffic.

The first step takes from ten seconds to a minute, again for every new shape. It hurts on short runs and on models so small that
Python is not what limits them. `fullgraph=True, dynamic=False`, always: a part that cannot be compiled is an error, not a slow path.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gptoughts.layer import Case, Engine, Evidence, Layer, Options, Reason, Sight, active, cannot, inactive, would_not_pay

SMALLEST_CPU_WIDTH = 256
CPU_COMPILE_SECONDS = 40
CPU_FLOPS_PER_SECOND = 2.5e11  # two AVX-512 BF16 cores reach about this in a step
CPU_GAIN = 0.08


def fits(case: Case, options: Options) -> Iterator[Reason]:
    """Inductor needs a C++ compiler on a CPU and Triton on a GPU; on a CPU the run must be long enough to earn the compilation."""
    facts = case.facts
    if case.facts.family is None:
        yield cannot("needs a model of a known family, whose blocks are known to be one graph")
        return
    if case.on_gpu:
        if "triton" not in case.machine.packages:
            yield cannot("needs the package triton, not installed", remedy="pip install triton")
        return
    if facts.width is not None and facts.width < SMALLEST_CPU_WIDTH:
        yield would_not_pay(
            f"width {facts.width} is below {SMALLEST_CPU_WIDTH}: Python is not what limits it",
            "docs/measurements/cpu/step.json",
        )
        return
    seconds = _run_seconds(case)
    if seconds is not None and seconds * CPU_GAIN < CPU_COMPILE_SECONDS:
        yield would_not_pay(
            f"the run takes about {seconds:.0f} s here and compilation about {CPU_COMPILE_SECONDS} s",
            "docs/measurements/cpu/step.json",
        )


def _run_seconds(case: Case) -> float | None:
    """A rough length of the run on this CPU; None where it cannot be told."""
    from gptoughts.facts import flops_per_token

    flops, train = flops_per_token(case.facts), case.recipe.train
    if train.hours is not None:
        return train.hours * 3600
    tokens = train.tokens or (train.steps or 0) * train.global_batch * case.recipe.data.sequence_length
    if not flops or not tokens:
        return None
    return flops * tokens / (CPU_FLOPS_PER_SECOND * max(1, case.machine.cpu.usable_cores) / 2)


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Compile each block in place, which keeps parameter names as they are."""
    for block in engine.blocks.values():
        block.compile(fullgraph=True, dynamic=False)
    yield
    for block in engine.blocks.values():
        block._compiled_call_impl = None


def verify(engine: Engine, sight: Sight, options: Options) -> Evidence:
    """Every forward of every block was a call of a compiled region. A full cache leaves blocks eager without a word: this counts."""
    wanted = sight.blocks * sight.micro_batches
    if sight.blocks == 0:
        return inactive("the model has no blocks to compile")
    if sight.regions < wanted:
        return inactive(f"{sight.regions} compiled calls in {wanted} block forwards", compiled=sight.regions, expected=wanted)
    return active(f"{sight.regions} compiled calls in {wanted} block forwards", compiled=sight.regions, expected=wanted)


LAYER = Layer(
    name="compile-blocks",
    slot="compile",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    fits=fits,
    changes_numerics=True,
    warm_steps=1,
)
