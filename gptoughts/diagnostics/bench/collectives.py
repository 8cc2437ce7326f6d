"""Measure the time that a step spends in collectives: in all, and the part that no computation hides."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gptoughts.engine.engine import Engine

ON_HOST = ("gloo:", "mpi:", "c10d::")
"""Prefixes of collectives on a CPU: from the start of the exchange to its end, on a thread of the backend or in the call."""
ON_GPU = "nccl"
"""Part of the names of NCCL's kernels."""
COMPUTES = ("aten::", "Torch-Compiled Region", "CompiledFunction", "Optimizer.step#")

Interval = tuple[int, int]
"""Begin and end in ns."""


@dataclass(frozen=True)
class CollectiveTimes:
    """Seconds of one step of one rank. Collectives include the wait for the slowest rank."""

    step: float
    collectives: float
    """Seconds in which at least one collective was in progress."""
    exposed: float
    """The part of `collectives` in which the rank computed nothing."""


def collective_times(engine: Engine, step: Callable[[], float]) -> CollectiveTimes:
    """Call `step`, which returns its seconds, under a profiler without shapes and memory."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    on_gpu = engine.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        seconds = step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    exchanging, computing = split(profiler.profiler.kineto_results.events(), on_gpu)
    return CollectiveTimes(seconds, length(exchanging) / 1e9, exposed(exchanging, computing) / 1e9)


def split(events: Iterable[Any], on_gpu: bool) -> tuple[list[Interval], list[Interval]]:
    """Return the intervals of collectives and of computation: kernels on a GPU, operators on a CPU."""
    exchanging, computing = [], []
    for event in events:
        name, began = event.name(), event.start_ns()
        span = (began, began + event.duration_ns())
        if (event.device_type() == torch.autograd.DeviceType.CPU) == on_gpu:
            continue
        if ON_GPU in name.lower() if on_gpu else name.startswith(ON_HOST):
            exchanging.append(span)
        elif on_gpu or name.startswith(COMPUTES):
            computing.append(span)
    return exchanging, computing


def union(spans: Iterable[Interval]) -> list[Interval]:
    """Return the same time as disjoint intervals in order."""
    found: list[Interval] = []
    for began, ended in sorted(spans):
        if found and began <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], ended))
        else:
            found.append((began, ended))
    return found


def length(spans: Iterable[Interval]) -> int:
    """Return the time covered by at least one interval."""
    return sum(ended - began for began, ended in union(spans))


def exposed(exchanging: Sequence[Interval], computing: Sequence[Interval]) -> int:
    """Return the time of collectives outside of all computation."""
    return length([*exchanging, *computing]) - length(computing)
