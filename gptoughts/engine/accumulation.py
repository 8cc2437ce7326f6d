"""Gradient accumulation over the micro-batches of one global batch, with a smaller micro-batch after an out-of-memory error."""

from __future__ import annotations

import torch
from torch import Tensor

from gptoughts.console import note
from gptoughts.engine.engine import Engine
from gptoughts.engine.objectives.base import Batch
from gptoughts.engine.oom import OutOfMemory, free_failed_step, is_out_of_memory, next_micro_batch
from gptoughts.engine.progress import BACKWARD, FORWARD, OTHER
from gptoughts.errors import RunError


def accumulate(engine: Engine, batch: Batch, scale: Tensor) -> Tensor:
    """Accumulate the gradient of `batch`, each loss times `scale`. Returns the summed loss of this rank, a scalar on the device.

    After an out-of-memory error a single process computes the same batch again from the same random state, with at most half the
    micro-batch; the global batch stays. Raises OutOfMemory with several ranks, which must all exit; RunError if one sequence does not
    fit, or if weights have changed already.
    """
    rng = _rng_state(engine)
    while True:
        try:
            return _accumulate_once(engine, batch, scale)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            cause = str(error).splitlines()[0]
        # Outside of the handler, whose traceback keeps the frames and their activations alive.
        _reduce_micro_batch(engine, batch, cause)
        _restore_rng(engine, rng)


def _accumulate_once(engine: Engine, batch: Batch, scale: Tensor) -> Tensor:
    micro_batches = engine.micro_batches(batch)
    loss_sum = torch.zeros((), device=engine.device)
    for index, micro_batch in enumerate(micro_batches):
        engine.mark(FORWARD)
        with engine.grad_sync(index == len(micro_batches) - 1):
            with engine.forward_context():
                loss = engine.objective(engine.model, micro_batch)
            engine.mark(BACKWARD)
            engine.backward(loss * scale)
            engine.mark(OTHER)
        loss_sum += loss.detach()
    engine.counters.micro_batches += len(micro_batches)
    return loss_sum


def _reduce_micro_batch(engine: Engine, batch: Batch, cause: str) -> None:
    rows = len(next(iter(batch.values())))
    now = min(engine.micro_batch or rows, rows)
    less = next_micro_batch(now, rows)
    for parameter in engine.parameters():
        parameter.grad = None
    engine.objective.forget()
    free_failed_step(engine.device)
    if less is None:
        raise RunError(
            f"out of memory with one sequence per forward: {cause}",
            fix="gptoughts plan, which lists layers that need less, or a shorter --data.sequence-length",
        )
    if not engine.repeatable:
        raise RunError(
            f"out of memory with {now} sequences per forward, after this backward updated some weights: {cause}",
            fix=f"--layer.update after-clip --layer.microbatch fixed --layer.microbatch.sequences {less}",
        )
    if engine.ranks.size > 1:
        raise OutOfMemory(
            f"out of memory on rank {engine.ranks.world.rank} with {now} sequences per forward: {cause}",
            less,
            fix=f"start the run again: it resumes from its last checkpoint with {less} sequences per forward",
        )
    engine.reduced_from = engine.reduced_from or now
    engine.micro_batch = less
    note(f"memory ran out with {now} sequences per forward; the same batch again with {less}, the global batch stays")


def _rng_state(engine: Engine) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(engine.device)] if engine.device.type == "cuda" else states


def _restore_rng(engine: Engine, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], engine.device)
