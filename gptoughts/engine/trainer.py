"""The training loop: take a batch, call the engine's step hooks, run callbacks. It names no optimization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor

from gptoughts.engine.accumulation import accumulate
from gptoughts.engine.callback import Callback
from gptoughts.engine.engine import Engine
from gptoughts.engine.optim.lr_schedule import set_rate
from gptoughts.engine.progress import COMMUNICATION, DATA_WAIT, END, OPTIMIZER, OTHER, Progress, StepStats


def train_step(engine: Engine, rate: float) -> StepStats:
    """Run one update on one global batch: forward and backward per micro-batch, clip, step.

    The loss is the sum over all micro-batches and ranks divided by the sum of their weights. Ranks average gradients, so each loss is
    also multiplied by their number.
    """
    if engine.optimizer is not None:
        set_rate(engine.optimizer, rate)  # before the backward, which may already update weights
    engine.mark(DATA_WAIT)
    batch, cursor = engine.next_batch()
    engine.mark(OTHER)
    own_weight = engine.objective.weight(batch)
    engine.mark(COMMUNICATION)
    weight = engine.ranks.sum(own_weight)
    engine.mark(OTHER)
    # A weight of 0 makes a bad step; until that is read it must not make the weights NaN.
    scale = engine.ranks.size / torch.where(weight > 0, weight, torch.ones_like(weight))
    own_loss = accumulate(engine, batch, scale)
    engine.mark(COMMUNICATION)
    loss_sum = engine.ranks.sum(own_loss)
    engine.mark(OPTIMIZER)
    grad_norm = engine.clip()
    engine.usable = is_usable(loss_sum, weight, grad_norm)
    updated = engine.step()
    engine.mark(END)
    engine.counters.updates += updated
    tokens = engine.objective.tokens(batch) * engine.ranks.size
    return StepStats(loss_sum, weight, grad_norm, updated, tokens, cursor, rate, batch)


def is_usable(loss_sum: Tensor, weight: Tensor, grad_norm: Tensor) -> Tensor:
    """Return whether a step has a label, a finite loss and a finite gradient: a scalar on the device, equal on all ranks."""
    return torch.isfinite(loss_sum) & torch.isfinite(grad_norm) & (weight > 0)


def run_step(engine: Engine, progress: Progress, schedule: Callable[[Progress], float]) -> tuple[Progress, StepStats]:
    """Run one step. Returns the progress after it and the step's results."""
    engine.report("step")
    began = perf_counter()
    stats = train_step(engine, schedule(progress))
    reached = replace(
        progress,
        step=progress.step + stats.updated,
        tokens=progress.tokens + stats.tokens,
        seconds=progress.seconds + perf_counter() - began,
        cursor=stats.cursor,
    )
    return reached, stats


def run_callbacks(
    engine: Engine, progress: Progress, stats: StepStats, callbacks: Sequence[Callback], last: bool, stopped: bool = False
) -> Progress:
    """Run the callbacks that are due after this step, then return the model to training mode."""
    last = last or stopped
    due = [callback for callback in callbacks if callback.due(progress.step, last) and (callback.on_stop or not stopped)]
    if any(callback.touches_weights for callback in due):
        began = perf_counter()
        engine.synchronize()
        progress = replace(progress, seconds=progress.seconds + perf_counter() - began)
    for callback in due:
        engine.report(callback.phase)
        callback.on_step(engine, progress, stats, last)
        if callback.touches_weights:
            engine.model.train()
    return progress


def train(
    engine: Engine,
    progress: Progress,
    finished: Callable[[Progress], bool],
    schedule: Callable[[Progress], float],
    callbacks: Sequence[Callback] = (),
    stop: Callable[[Progress], bool] = lambda progress: False,
    *,
    pause: Callable[[Progress], bool] = lambda progress: False,
) -> Progress:
    """Run steps from `progress` until `finished`, `stop` or `pause` returns True. Returns the progress reached.

    `finished` and `stop` end the run: callbacks get `last=True`. After `pause` the caller may continue.
    """
    engine.model.train()
    while not (finished(progress) or pause(progress)):
        progress, stats = run_step(engine, progress, schedule)
        stopped = stop(progress)
        progress = run_callbacks(engine, progress, stats, callbacks, finished(progress), stopped)
        if stopped:
            break
    return progress
