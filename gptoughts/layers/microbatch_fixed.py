"""A fixed number of sequences per forward, with gradient accumulation over the global batch: less memory, same training.

Too small a micro-batch leaves the GPU idle between small kernels. The size is the largest divisor of the rank's share up to `sequences`
or, if that is not set, up to `tokens` divided by the sequence length: every forward has the same shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gptoughts.planning.layer import Budget, Case, Engine, Evidence, Layer, Option, Options, StepTrace, active, inactive


def size(options: Options, share: int, sequence_length: int) -> int:
    """Return sequences per forward for a rank's share of the global batch."""
    most = options["sequences"] or max(1, options["tokens"] // sequence_length)
    return next(count for count in range(min(most, share), 0, -1) if share % count == 0)


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """Activations of one slice; gradients accumulate over slices."""
    return budget.per_forward(size(options, case.rank_sequences, case.recipe.data.sequence_length), case.rank_sequences)


def _share(engine: Engine) -> int:
    return engine.recipe.train.global_batch // engine.ranks.size


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Set the micro-batch size on the engine."""
    before = engine.micro_batch
    engine.micro_batch = size(options, _share(engine), engine.recipe.data.sequence_length)
    try:
        yield
    finally:
        engine.micro_batch = before


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require one forward per slice of the rank's share."""
    planned = size(options, _share(engine), engine.recipe.data.sequence_length)
    per_forward = engine.micro_batch if engine.reduced_from and engine.micro_batch else planned
    wanted = _share(engine) // per_forward
    if trace.micro_batches != wanted:
        return inactive(
            f"{trace.micro_batches} forwards in the step, {wanted} planned", forwards=trace.micro_batches, expected=wanted
        )
    less = f", reduced from {engine.reduced_from} after running out of memory" if engine.reduced_from else ""
    return active(f"{wanted} forwards of {per_forward} sequences{less}", forwards=wanted, sequences=per_forward)


LAYER = Layer(
    name="fixed",
    slot="microbatch",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    memory_rank=0,
    options={
        "sequences": Option(None, "sequences per forward", int),
        "tokens": Option(16384, "tokens per forward if sequences is not set", int),
    },
)
