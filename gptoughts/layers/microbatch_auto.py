"""Micro-batch size measured on this machine before step 1: the fastest that fits in memory, without manual tuning.

Two small sizes run forward and backward with gradients and optimizer state allocated; linear extrapolation of their peak memory predicts
the largest size that fits, which is then run along with half of it; the smallest that reaches 97 % of the best speed is used. Weights,
optimizer and random state are restored: training equals `fixed` with the same size. It costs a few forwards, and with compilation as
many graphs. The size divides the rank's share, so all forwards have one shape; a resumed run keeps its size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gptoughts.console import bytes_in_words
from gptoughts.planning.layer import (
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
    """A positive memory limit."""
    limit = options["memory_gib"]
    if limit is not None and limit <= 0:
        yield unsupported(f"memory_gib = {limit:g}: must be above 0", "--layer.microbatch.memory-gib 8")


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """The largest size expected to fit."""
    share, room = case.rank_sequences, memory_of_rank(case)
    sizes = divisors(share, options["sequences"])
    tried = [budget.per_forward(size, share) for size in sizes]
    fitting = [one for one in tried if verdict(one.peak, room) in (Verdict.FITS, Verdict.UNKNOWN)]
    return (fitting or tried[:1])[-1]


def divisors(share: int, most: int | None) -> list[int]:
    """Return the divisors of a rank's share up to `most`, smallest first."""
    return [size for size in range(1, min(share, most or share) + 1) if share % size == 0]


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Search for the size and set it on the engine."""
    from gptoughts.layers.support.micro_batch_search import search

    share = engine.recipe.train.global_batch // engine.ranks.size
    before = engine.micro_batch
    engine.micro_batch = search(engine, divisors(share, options["sequences"]), options["memory_gib"])
    engine.counters.call_counts[LAYER.name] += 1
    try:
        yield
    finally:
        del engine.counters.call_counts[LAYER.name]
        engine.micro_batch = before


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require that a size was searched, and one forward per slice of that size."""
    if not engine.counters.call_counts[LAYER.name] or not engine.micro_batch:
        return inactive("no micro-batch size was searched")
    wanted = engine.recipe.train.global_batch // engine.ranks.size // engine.micro_batch
    figures = {"forwards": trace.micro_batches, "expected": wanted, "sequences": engine.micro_batch}
    if trace.micro_batches != wanted:
        return inactive(f"{trace.micro_batches} forwards in the step, {wanted} planned", **figures)
    held = f", peak {bytes_in_words(trace.peak_bytes)}" if trace.peak_bytes else ""
    less = f", reduced from {engine.reduced_from} after running out of memory" if engine.reduced_from else ""
    return active(f"{wanted} forwards of {engine.micro_batch} sequences{held}{less}", **figures)


LAYER = Layer(
    name="auto",
    slot="microbatch",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    former_names=("fit",),
    options={
        "sequences": Option(None, "maximum sequences per forward to try", int),
        "memory_gib": Option(None, "memory limit in GiB; default 11/12 of the free memory", float),
    },
)
