"""Run one real training step under torch's profiler and return what it did as a `StepTrace`."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch

from gptoughts.engine.distributed.shards import sums
from gptoughts.engine.engine import Engine
from gptoughts.engine.memory_usage import bytes_in_use, peak_of
from gptoughts.engine.trainer import Progress, StepStats, run_step
from gptoughts.layers.support.compile import recompiles
from gptoughts.planning.evidence import Operator, StepTrace

COMPILED_REGION = "Torch-Compiled Region"


@dataclass
class ProfilerTotals:
    """Sums over the profiler's events of one step."""

    calls: Counter[str] = field(default_factory=Counter)
    dtypes: dict[str, Counter[tuple[str, ...]]] = field(default_factory=lambda: defaultdict(Counter))
    kernels: Counter[str] = field(default_factory=Counter)
    regions: int = 0
    allocations: list[tuple[int, int]] = field(default_factory=list)
    """(time in ns, bytes) of CPU allocations; frees are negative."""
    copies: Counter[str] = field(default_factory=Counter)
    copy_streams: set[int] = field(default_factory=set)
    kernel_streams: set[int] = field(default_factory=set)


def watch(engine: Engine, progress: Progress, schedule: Callable[[Progress], float]) -> tuple[Progress, StepStats, StepTrace]:
    """Run one training step from `progress` under the profiler. `StepTrace.updated` tells whether it updated the weights."""
    done: list[tuple[Progress, StepStats]] = []
    trace = trace_step(engine, lambda: done.append(run_step(engine, progress, schedule)))
    reached, stats = done[0]
    if engine.skips_bad_steps and not engine.usable:
        trace = replace(trace, updated=False)
    return reached, stats, trace


def trace_step(engine: Engine, step: Callable[[], object]) -> StepTrace:
    """Call `step` under the profiler and return operators, kernels, counters and peak memory."""
    before_step, counted, call_counts = checksums(engine), vars(engine.counters).copy(), engine.counters.call_counts.copy()
    before = bytes_in_use(engine)
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    with profiled(engine) as totals:
        began = perf_counter()
        step()
        engine.synchronize()
        seconds = perf_counter() - began
    counters = engine.counters
    moved = any(old != new for old, new in zip(before_step, checksums(engine), strict=True))
    return StepTrace(
        operators={name: Operator(name, calls, dict(totals.dtypes[name])) for name, calls in totals.calls.items()},
        kernels=dict(totals.kernels),
        regions=totals.regions,
        micro_batches=counters.micro_batches - counted["micro_batches"],
        blocks=len(engine.blocks),
        attentions=None if engine.family.attentions is None else len(engine.family.attentions(engine.bare)),
        updated=counters.updates > counted["updates"],
        weights_moved=moved,
        step_seconds=seconds,
        data_wait_seconds=counters.data_wait_seconds - counted["data_wait_seconds"],
        memcpy_streams=len(totals.copy_streams - totals.kernel_streams),
        copies=dict(totals.copies),
        peak_bytes=_peak(engine, before, totals),
        recompiles=recompiles(),
        call_counts=dict(counters.call_counts - call_counts),
    )


def checksums(engine: Engine) -> list[float]:
    """Return one float64 sum per parameter on this rank, to detect whether a step moved it."""
    return sums(engine.parameters())


def _peak(engine: Engine, before: int, totals: ProfilerTotals) -> int | None:
    if engine.device.type == "cuda":
        return torch.cuda.max_memory_allocated(engine.device)
    return peak_of(before, totals.allocations) if totals.allocations else None


@contextmanager
def profiled(engine: Engine) -> Iterator[ProfilerTotals]:
    """Profile the block and fill the totals. Reads the profiler's raw events, since only they carry input dtypes."""
    # Kineto prints two trace points to standard error below this log level.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if engine.device.type == "cuda" else [])
    totals = ProfilerTotals()
    on_cpu = engine.device.type == "cpu"  # elsewhere the allocator keeps its own peak
    with profile(activities=activities, record_shapes=True, profile_memory=on_cpu, acc_events=True) as profiler:
        yield totals
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    add_events(profiler.profiler.kineto_results.events(), totals)


def add_events(events: Iterable[Any], totals: ProfilerTotals) -> None:
    """Add the profiler's raw events to `totals`."""
    operators, updating = [], []
    for event in events:
        name = event.name()
        if name == "[memory]":
            totals.allocations.append((event.start_ns(), event.nbytes()))
        elif event.device_type() == torch.autograd.DeviceType.CPU:
            totals.calls[name] += 1
            totals.regions += name.startswith(COMPILED_REGION)
            operators += [event] if name.startswith("aten::") else []
            updating += [event] if name.startswith("Optimizer.step#") else []
        elif name.startswith("Memcpy"):
            direction = name.split()[1]
            totals.copies[direction] += 1
            if direction == "HtoD":
                totals.copy_streams.add(event.device_resource_id())
        elif not name.startswith("Memset"):
            totals.kernels[name] += 1
            totals.kernel_streams.add(event.device_resource_id())
    updates = [(event.start_ns(), event.start_ns() + event.duration_ns()) for event in updating]
    open_in: dict[int, list[Any]] = defaultdict(list)  # thread -> operators that have begun and not ended, outermost first
    for event in sorted(operators, key=lambda event: event.start_ns()):
        if _is_model_work(event, updates):
            totals.dtypes[event.name()][tuple(event.dtypes())] += 1
        _drop_outer_record(event, open_in[event.start_thread_id()], totals, updates)


def _is_model_work(event: Any, updates: list[tuple[int, int]]) -> bool:
    """Return whether an operator belongs to forward or backward and counts for the precision proof.

    Excluded: operators inside the optimizer's update (float32 in any case), and outer products of a column and a row, which some
    models use for rotary angles in float32 on purpose.
    """
    began = event.start_ns()
    if any(first <= began < last for first, last in updates):
        return False
    if event.name() not in ("aten::mm", "aten::bmm"):
        return True
    shapes = event.shapes()
    return not (shapes and shapes[0] and shapes[0][-1] == 1)


def _drop_outer_record(event: Any, around: list[Any], totals: ProfilerTotals, updates: list[tuple[int, int]]) -> None:
    """Count an operator called under autocast once: torch records it with the inputs given and, inside, with those it computed with.

    The inner record is what ran.
    """
    name, began = event.name(), event.start_ns()
    while around and around[-1].start_ns() + around[-1].duration_ns() <= began:
        around.pop()
    if around and around[-1].name() == name:
        totals.calls[name] -= 1
        totals.dtypes[name][tuple(around[-1].dtypes())] -= _is_model_work(around[-1], updates)
    around.append(event)
