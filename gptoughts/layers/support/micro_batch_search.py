"""Measure peak memory and speed of micro-batch sizes in trial steps before step 1, and restore all state afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from time import perf_counter
from typing import Any

import torch

from gptoughts.console import GIB, bytes_in_words, note
from gptoughts.engine.engine import Engine
from gptoughts.engine.memory_usage import bytes_in_use, measured
from gptoughts.engine.objectives.base import Batch
from gptoughts.engine.oom import free_failed_step, is_out_of_memory
from gptoughts.errors import RunError

FREE_SHARE = 11 / 12
"""Share of free memory that a trial may use; the rest is for validation, fragmentation and buffers of the update."""
AS_FAST = 0.97
"""A smaller size with this share of the best speed is preferred: it leaves more memory."""


@dataclass(frozen=True)
class Trial:
    """Peak memory and sequences per second of one size; no speed if it ran out of memory."""

    size: int
    peak_bytes: int
    speed: float | None


class Peeked:
    """Batches whose first one is yielded again. Other attributes are those of the wrapped batches."""

    def __init__(self, first: Any, rest: Iterator[Any]) -> None:
        self._rest, self._chained = rest, chain([first], rest)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._chained)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rest, name)


def search(engine: Engine, sizes: Sequence[int], memory_gib: float | None) -> int:
    """Return the fastest of `sizes` that fits in memory. All ranks try the same sizes and choose the same.

    Raises RunError if not even the smallest fits.
    """
    room = _room(engine, memory_gib)
    first = engine.next_batch()
    engine.batches = Peeked(first, engine.batches)
    trials: dict[int, Trial] = {}
    with _put_back(engine):
        if _allocate_state(engine, first[0], sizes[0], trials):
            for size in sizes[:2]:
                if not _within(_try(engine, first[0], size, trials), room):
                    break
            guess = _largest(trials, sizes, room)
            while guess not in trials and not _within(_try(engine, first[0], guess, trials), room):
                guess = max(size for size in sizes if size < guess)
            half = max((size for size in sizes if size <= guess // 2), default=guess)
            if half not in trials:
                _try(engine, first[0], half, trials)
    fitting = [trial for trial in trials.values() if _within(trial, room)]
    if not fitting:
        least = trials[sizes[0]]
        need = (
            f"takes {bytes_in_words(least.peak_bytes)}"
            if least.speed
            else f"ran out of memory at {bytes_in_words(least.peak_bytes)}"
        )
        raise RunError(
            f"microbatch=auto: a step with {least.size} sequences per forward {need}, available {bytes_in_words(room)}",
            fix="gptoughts plan, which lists layers that need less memory",
        )
    best = max(trial.speed or 0.0 for trial in fitting)
    taken = min((trial for trial in fitting if (trial.speed or 0.0) >= AS_FAST * best), key=lambda trial: trial.size)
    if engine.ranks.first:
        measurements = "; ".join(_row(trial, room) for trial in sorted(trials.values(), key=lambda trial: trial.size))
        note(f"micro-batch {taken.size} of {sizes[-1]} sequences, by measuring: {measurements}")
    return taken.size


def _row(trial: Trial, room: int) -> str:
    text = f"{trial.size}: {bytes_in_words(trial.peak_bytes)}"
    return f"{text}, {trial.speed:.1f} sequences/s" if _within(trial, room) else f"{text}, does not fit"


def _within(trial: Trial, room: int) -> bool:
    return trial.speed is not None and trial.peak_bytes <= room


def _room(engine: Engine, memory_gib: float | None) -> int:
    """Return the bytes this process may use on its device, the minimum over ranks."""
    if memory_gib is not None:
        mine = int(memory_gib * GIB)
    elif engine.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(engine.device)
        mine = int((free + torch.cuda.memory_reserved(engine.device)) * FREE_SHARE)
    else:
        from gptoughts.hardware.cpu import read_free_bytes

        free_bytes = read_free_bytes()
        mine = (
            int(free_bytes * FREE_SHARE / engine.ranks.world.local_world_size) + bytes_in_use(engine)
            if free_bytes
            else 2**63 - 1
        )
    return int(-engine.ranks.largest(-mine))


def _largest(trials: Mapping[int, Trial], sizes: Sequence[int], room: int) -> int:
    """Extrapolate the trials' memory linearly to the largest size that fits; the smallest if a trial failed already."""
    known = sorted(trials.values(), key=lambda trial: trial.size)
    if len(known) < 2 or not _within(known[-1], room):
        return known[0].size
    one, two = known[:2]
    slope = max(0.0, (two.peak_bytes - one.peak_bytes) / (two.size - one.size))
    return max((size for size in sizes if one.peak_bytes + slope * (size - one.size) <= room), default=one.size)


def _try(engine: Engine, batch: Batch, size: int, trials: dict[int, Trial]) -> Trial:
    """Run forward and backward of `size` sequences twice, and measure the second, with gradients allocated."""
    peak, seconds = 0, None
    try:
        _forward_backward(engine, batch, size)  # compiles, and allocates gradients
        engine.synchronize()
        with measured(engine) as highest:
            began = perf_counter()
            _forward_backward(engine, batch, size)
            engine.synchronize()
            seconds = perf_counter() - began
        peak = highest.size or 0
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        seconds = None
    peak = _cleared(engine, peak)
    failed = engine.ranks.any(seconds is None)
    slowest = engine.ranks.largest(seconds or 0.0)
    trials[size] = Trial(size, int(engine.ranks.largest(peak)), None if failed else size / slowest)
    return trials[size]


def _forward_backward(engine: Engine, batch: Batch, size: int) -> None:
    part = {key: value[:size] for key, value in batch.items()}
    with engine.grad_sync(False):
        with engine.forward_context():
            loss = engine.objective(engine.model, part)
        engine.backward(loss / max(1.0, float(engine.objective.weight(part))))


def _allocate_state(engine: Engine, batch: Batch, size: int, trials: dict[int, Trial]) -> bool:
    """Allocate optimizer state with an update at learning rate 0. Returns whether all ranks had enough memory; else adds a failed
    trial.
    """
    assert engine.optimizer is not None
    short = False
    try:
        _forward_backward(engine, batch, size)
        for group in engine.optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
        engine.optimizer.step()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        short = True
    peak = _cleared(engine, 0)
    if engine.ranks.any(short):
        trials[size] = Trial(size, int(engine.ranks.largest(peak or bytes_in_use(engine))), None)
    return size not in trials


def _cleared(engine: Engine, peak: int) -> int:
    """Free the memory of a trial. Returns `peak`, or on a GPU the allocator's peak if `peak` is 0, as after running out of memory."""
    for parameter in engine.parameters():
        parameter.grad = None
    if engine.device.type == "cuda":
        peak = peak or torch.cuda.max_memory_allocated(engine.device)
    free_failed_step(engine.device)
    return peak


@contextmanager
def _put_back(engine: Engine) -> Iterator[None]:
    """Restore weights, buffers, optimizer, random state and layer state on exit."""
    assert engine.optimizer is not None
    kept = {
        name: tensor.detach().to("cpu", copy=True)
        for name, tensor in (*engine.bare.named_parameters(), *engine.bare.named_buffers())
    }
    optimizer = deepcopy(engine.optimizer.state_dict())
    extras = {name: deepcopy(extra.state_dict()) for name, extra in engine.extras.items()}
    counters = deepcopy(engine.counters)
    drawn = torch.get_rng_state(), torch.cuda.get_rng_state(engine.device) if engine.device.type == "cuda" else None
    training = engine.model.training
    engine.model.train()
    try:
        yield
    finally:
        engine.model.train(training)
        with torch.no_grad():
            for name, tensor in (*engine.bare.named_parameters(), *engine.bare.named_buffers()):
                tensor.copy_(kept[name])
        engine.optimizer.load_state_dict(optimizer)
        for name, extra in engine.extras.items():
            extra.load_state_dict(extras[name])
        call_counts = engine.counters.call_counts  # layers hold a reference to this object
        call_counts.clear()
        call_counts.update(counters.call_counts)
        vars(engine.counters).update({**vars(counters), "call_counts": call_counts})
        engine.objective.forget()
        for pair in engine.objective.meters.values():
            for part in pair:
                part.zero_()
        torch.set_rng_state(drawn[0])
        if drawn[1] is not None:
            torch.cuda.set_rng_state(drawn[1], engine.device)
