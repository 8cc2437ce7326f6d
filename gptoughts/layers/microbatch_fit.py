"""The micro-batch is found by measuring on this very machine before step 1: a fast one that fits, nothing to guess or to try by hand.

Two small sizes are run forward and backward with gradients and optimizer state in place; a line through their highest memory says what the
largest fitting size should be, which is then run, and the half of it; the smallest that reaches 97 % of the best speed is taken. Weights,
optimizer and random state are put back: the training is that of `fixed` with the same size. It costs a few forwards, under compilation
as many graphs. The size is a divisor of the rank's share, so that all forwards have one shape; a run that goes on keeps the size that it
had.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gptoughts.console import bytes_in_words
from gptoughts.planning.layer import (  # fmt: skip
    Budget,
    Case,
    Engine,
    Evidence,
    Layer,
    Option,
    Options,
    Reason,
    StepTrace,
    active,
    inactive,
    unsupported,
)
from gptoughts.planning.memory_fit import memory_of_rank
from gptoughts.planning.memory_model import Verdict, verdict


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """Memory to stay within."""
    limit = options["memory_gib"]
    if limit is not None and limit <= 0:
        yield unsupported(
            f"memory_gib = {limit:g} leaves no memory at all", "--layer.microbatch.memory-gib with a number above 0"
        )


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """What the largest size would hold that is expected to fit."""
    share, room = case.rank_sequences, memory_of_rank(case)
    sizes = divisors(share, options["sequences"])
    tried = [budget.per_forward(size, share) for size in sizes]
    fitting = [one for one in tried if verdict(one.peak, room) in (Verdict.FITS, Verdict.UNKNOWN)]
    return (fitting or tried[:1])[-1]


def divisors(share: int, most: int | None) -> list[int]:
    """Sizes that cut a rank's share into equal forwards, the smallest first."""
    return [size for size in range(1, min(share, most or share) + 1) if share % size == 0]


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Find the size and tell the engine."""
    from gptoughts.layers.support.micro_batch_search import search

    share = engine.recipe.train.global_batch // engine.ranks.size
    before = engine.micro_batch
    engine.micro_batch = search(engine, divisors(share, options["sequences"]), options["memory_gib"])
    engine.counters.call_counts["fit"] += 1
    yield
    del engine.counters.call_counts["fit"]
    engine.micro_batch = before


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """The step had as many forwards as the share has slices of the size that was found, and held no more than was there."""
    if not engine.counters.call_counts["fit"] or not engine.micro_batch:
        return inactive("no micro-batch was searched for")
    wanted = engine.recipe.train.global_batch // engine.ranks.size // engine.micro_batch
    figures = {"forwards": trace.micro_batches, "expected": wanted, "sequences": engine.micro_batch}
    if trace.micro_batches != wanted:
        return inactive(f"{trace.micro_batches} forwards in the step, {wanted} planned", **figures)
    held = f", {bytes_in_words(trace.peak_bytes)} at most" if trace.peak_bytes else ""
    less = f", made smaller from {engine.reduced_from} when memory ran out" if engine.reduced_from else ""
    return active(f"{wanted} forwards of {engine.micro_batch} sequences{held}{less}", **figures)


LAYER = Layer(
    name="fit",
    slot="microbatch",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    options={
        "sequences": Option(None, "most sequences per forward to try", int),
        "memory_gib": Option(None, "memory to stay within, in GiB; without it what is free, less a twelfth", float),
    },
)
