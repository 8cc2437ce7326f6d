"""A fixed number of sequences per forward; the rest of the global batch is accumulated, so memory falls and the training stays.

Too small a micro-batch leaves the GPU idle between small kernels. It is the largest divisor of the rank's share that is not above
`sequences` or, where that is not given, not above `tokens` divided by the sequence length: every forward has the same shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gptoughts.planning.layer import Budget, Case, Engine, Evidence, Layer, Option, Options, StepTrace, active, inactive


def size(options: Options, share: int, sequence_length: int) -> int:
    """Sequences per forward for a rank's share of the global batch."""
    most = options["sequences"] or max(1, options["tokens"] // sequence_length)
    return next(count for count in range(min(most, share), 0, -1) if share % count == 0)


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """A forward holds the activations of a slice; gradients add up over the slices."""
    return budget.per_forward(size(options, case.rank_sequences, case.recipe.data.sequence_length), case.rank_sequences)


def _share(engine: Engine) -> int:
    return engine.recipe.train.global_batch // engine.ranks.size


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Tell the engine how to slice."""
    before = engine.micro_batch
    engine.micro_batch = size(options, _share(engine), engine.recipe.data.sequence_length)
    yield
    engine.micro_batch = before


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """The step had as many forwards as the share has slices."""
    planned = size(options, _share(engine), engine.recipe.data.sequence_length)
    per_forward = engine.micro_batch if engine.reduced_from and engine.micro_batch else planned
    wanted = _share(engine) // per_forward
    if trace.micro_batches != wanted:
        return inactive(
            f"{trace.micro_batches} forwards in the step, {wanted} planned", forwards=trace.micro_batches, expected=wanted
        )
    less = f", made smaller from {engine.reduced_from} when memory ran out" if engine.reduced_from else ""
    return active(f"{wanted} forwards of {per_forward} sequences{less}", forwards=wanted, sequences=per_forward)


LAYER = Layer(
    name="fixed",
    slot="microbatch",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    options={
        "sequences": Option(None, "sequences per forward", int),
        "tokens": Option(16384, "tokens per forward, where sequences is not given", int),
    },
)
