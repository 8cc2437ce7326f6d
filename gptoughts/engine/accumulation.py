"""The gradient of one global batch, micro-batch by micro-batch; where memory runs out, the same batch again in smaller ones."""

from __future__ import annotations

import torch
from torch import Tensor

from gptoughts.console import aside
from gptoughts.engine.engine import Engine
from gptoughts.engine.objectives.base import Batch
from gptoughts.engine.oom import OutOfMemory, ran_out, release, smaller
from gptoughts.errors import RunError


def accumulate(engine: Engine, batch: Batch, scale: Tensor) -> Tensor:
    """Add the gradient of `batch`, every loss times `scale`. Returns the summed loss of this rank, a scalar on the device.

    Where memory runs out one process halves its micro-batch and takes the same batch once more, from the same random state; the global
    batch and so the training stay. Raises OutOfMemory where there are several ranks, which must all leave; RunError where one sequence
    is too much, or where weights have changed already.
    """
    drawn = _random_state(engine)
    while True:
        try:
            return _once(engine, batch, scale)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            told = str(error).splitlines()[0]
        # Outside of the handler: while it is open its traceback holds the frames, and they the activations.
        _make_smaller(engine, batch, told)
        _restore(engine, drawn)


def _once(engine: Engine, batch: Batch, scale: Tensor) -> Tensor:
    micro_batches = engine.micro_batches(batch)
    loss_sum = torch.zeros((), device=engine.device)
    for index, micro_batch in enumerate(micro_batches):
        with engine.grad_sync(index == len(micro_batches) - 1):
            with engine.forward_context():
                loss = engine.objective(engine.model, micro_batch)
            engine.backward(loss * scale)
        loss_sum += loss.detach()
    engine.counters.micro_batches += len(micro_batches)
    return loss_sum


def _make_smaller(engine: Engine, batch: Batch, told: str) -> None:
    rows = len(next(iter(batch.values())))
    now = min(engine.micro_batch or rows, rows)
    less = smaller(now, rows)
    for parameter in engine.parameters():
        parameter.grad = None
    engine.objective.forget()
    release(engine.device)
    if less is None:
        raise RunError(
            f"memory ran out with one sequence per forward: {told}\n"
            "  try: gptoughts plan, which names layers that need less, or a shorter --data.sequence-length"
        )
    if not engine.repeatable:
        raise RunError(
            f"memory ran out with {now} sequences per forward, and some weights have been updated in this backward already: {told}\n"
            f"  try: --layer.update after-clip --layer.microbatch fixed --layer.microbatch.sequences {less}"
        )
    if engine.ranks.size > 1:
        raise OutOfMemory(
            f"memory ran out on rank {engine.ranks.world.rank} with {now} sequences per forward: {told}\n"
            f"  all ranks leave; started again, the run continues from its last checkpoint with {less}",
            less,
        )
    engine.reduced_from = engine.reduced_from or now
    engine.micro_batch = less
    aside(f"note: memory ran out with {now} sequences per forward; the same batch again with {less}, the global batch stays")


def _random_state(engine: Engine) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(engine.device)] if engine.device.type == "cuda" else states


def _restore(engine: Engine, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], engine.device)
