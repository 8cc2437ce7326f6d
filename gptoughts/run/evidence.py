"""Watches one real training step and asks every layer what it saw of itself. What was planned and is not active stops the run."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from gptoughts.engine.engine import Engine
from gptoughts.engine.memory_usage import held_bytes, highest
from gptoughts.errors import LayerError
from gptoughts.layers.support.compile import recompiles
from gptoughts.planning.layer import Evidence, Layer, Operator, Status, StepTrace
from gptoughts.planning.resolve import Plan

COMPILED_REGION = "Torch-Compiled Region"


@dataclass(frozen=True)
class LayerEvidence:
    """One line of the evidence: what was asked for and what the watched step showed."""

    slot: str
    layer: str
    evidence: Evidence
    instead: str = "--layer.SLOT with another layer"
    """What to type to do without it."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "slot": self.slot,
            "layer": self.layer,
            "status": str(self.evidence.status),
            "proof": self.evidence.text,
            "figures": dict(self.evidence.figures),
        }


@dataclass
class _Trace:
    calls: Counter[str] = field(default_factory=Counter)
    dtypes: dict[str, Counter[tuple[str, ...]]] = field(default_factory=lambda: defaultdict(Counter))
    kernels: Counter[str] = field(default_factory=Counter)
    regions: int = 0
    allocations: list[tuple[int, int]] = field(default_factory=list)
    """Moments and sizes, negative where memory is given back; of a CPU only."""
    copies: Counter[str] = field(default_factory=Counter)
    copy_streams: set[int] = field(default_factory=set)
    kernel_streams: set[int] = field(default_factory=set)


def warmup_steps(plan: Plan, catalog: Mapping[str, Layer]) -> int:
    """Updates to let pass before the watched one: the most that any planned layer asks for."""
    return max(catalog[choice.layer].warmup_steps for choice in plan.choices)


def watch(engine: Engine, one_step: Callable[[], None]) -> StepTrace:
    """Run one real training step under the profiler. Returns what was seen; whether it made an update stands in it."""
    sums, counted, call_counts = checksums(engine), vars(engine.counters).copy(), engine.counters.call_counts.copy()
    before = held_bytes(engine)
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    with _profiled(engine) as trace:
        began = perf_counter()
        one_step()
        engine.synchronize()
        seconds = perf_counter() - began
    counters = engine.counters
    moved = any(before != after for before, after in zip(sums, checksums(engine), strict=True))
    return StepTrace(
        operators={name: Operator(name, calls, dict(trace.dtypes[name])) for name, calls in trace.calls.items()},
        kernels=dict(trace.kernels),
        regions=trace.regions,
        micro_batches=counters.micro_batches - counted["micro_batches"],
        blocks=len(engine.blocks),
        updated=counters.updates > counted["updates"],
        weights_moved=moved,
        step_seconds=seconds,
        data_wait_seconds=counters.data_wait_seconds - counted["data_wait_seconds"],
        memcpy_streams=len(trace.copy_streams - trace.kernel_streams),
        copies=dict(trace.copies),
        peak_bytes=_peak(engine, before, trace),
        recompiles=recompiles(),
        call_counts=dict(counters.call_counts - call_counts),
    )


def checksums(engine: Engine) -> list[float]:
    """One float64 sum per parameter: enough to tell whether a step moved it."""
    sums = [parameter.detach().double().sum() for parameter in engine.parameters()]
    return torch.stack(sums).tolist() if sums else []


def _peak(engine: Engine, before: int, trace: _Trace) -> int | None:
    if engine.device.type == "cuda":
        return torch.cuda.max_memory_allocated(engine.device)
    return highest(before, trace.allocations) if trace.allocations else None


@contextmanager
def _profiled(engine: Engine) -> Iterator[_Trace]:
    """Fill a trace from torch's profiler. Its raw events are read because only they carry the dtypes of inputs."""
    # The profiler's library writes two trace points of its own to standard error, whatever it is asked for, below this level.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if engine.device.type == "cuda" else [])
    trace = _Trace()
    on_cpu = engine.device.type == "cpu"  # elsewhere the allocator keeps its own highest mark
    with profile(activities=activities, record_shapes=True, profile_memory=on_cpu, acc_events=True) as profiler:
        yield trace
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    _read(profiler.profiler.kineto_results.events(), trace)


def _read(events: Iterable[Any], trace: _Trace) -> None:
    operators, updating = [], []
    for event in events:
        name = event.name()
        if name == "[memory]":
            trace.allocations.append((event.start_ns(), event.nbytes()))
        elif event.device_type() == torch.autograd.DeviceType.CPU:
            trace.calls[name] += 1
            trace.regions += name.startswith(COMPILED_REGION)
            operators += [event] if name.startswith("aten::") else []
            updating += [event] if name.startswith("Optimizer.step#") else []
        elif name.startswith("Memcpy"):
            direction = name.split()[1]
            trace.copies[direction] += 1
            if direction == "HtoD":
                trace.copy_streams.add(event.device_resource_id())
        elif not name.startswith("Memset"):
            trace.kernels[name] += 1
            trace.kernel_streams.add(event.device_resource_id())
    updates = [(event.start_ns(), event.start_ns() + event.duration_ns()) for event in updating]
    open_in: dict[int, list[Any]] = defaultdict(list)  # thread -> operators that have begun and not ended, outermost first
    for event in sorted(operators, key=lambda event: event.start_ns()):
        if _is_of_the_model(event, updates):
            trace.dtypes[event.name()][tuple(event.dtypes())] += 1
        _take_off_outer(event, open_in[event.start_thread_id()], trace, updates)


def _is_of_the_model(event: Any, updates: list[tuple[int, int]]) -> bool:
    """Not a product within an optimizer's update, which is float32 whatever the model is, nor one that adds nothing up: a column times a
    row, as some models compute their rotary angles, in float32 on purpose.
    """
    began = event.start_ns()
    if any(first <= began < last for first, last in updates):
        return False
    if event.name() not in ("aten::mm", "aten::bmm"):
        return True
    shapes = event.shapes()
    return not (shapes and shapes[0] and shapes[0][-1] == 1)


def _take_off_outer(event: Any, around: list[Any], trace: _Trace, updates: list[tuple[int, int]]) -> None:
    """An operator called from Python is recorded twice under autocast: with the inputs that it was given, and inside with those it
    computed with. The inner one is what ran."""
    name, began = event.name(), event.start_ns()
    while around and around[-1].start_ns() + around[-1].duration_ns() <= began:
        around.pop()
    if around and around[-1].name() == name:
        trace.calls[name] -= 1
        trace.dtypes[name][tuple(around[-1].dtypes())] -= _is_of_the_model(around[-1], updates)
    around.append(event)


def evidence(engine: Engine, plan: Plan, catalog: Mapping[str, Layer], sight: StepTrace) -> list[LayerEvidence]:
    """Every layer's own verdict on the watched step, in the order of slots."""
    baselines = {layer.slot: layer.name for layer in catalog.values() if layer.baseline}
    return [
        LayerEvidence(
            choice.slot,
            choice.layer,
            catalog[choice.layer].verify(engine, sight, choice.options),
            f"--layer.{choice.slot.replace('_', '-')} {baselines[choice.slot]}",
        )
        for choice in plan.choices
    ]


def failures(seen: list[LayerEvidence], strict: bool = False) -> list[LayerEvidence]:
    """The lines that stop a run: inactive ones, and with `strict` unproven ones."""
    failing = [Status.INACTIVE, Status.UNPROVEN] if strict else [Status.INACTIVE]
    return [line for line in seen if line.evidence.status in failing]


def demand(seen: list[LayerEvidence], strict: bool = False) -> None:
    """Raise LayerError for every layer that was planned and not active; `strict` stops on unproven ones too."""
    lines = [f"  {line.slot}={line.layer}: {line.evidence.text}" for line in failures(seen, strict)]
    if lines:
        raise LayerError(
            "planned and not active in the watched step\n"
            + "\n".join(lines)
            + f"\n  try: {' '.join(line.instead for line in failures(seen, strict))}   (gptoughts layers lists the others)"
        )


def table(seen: list[LayerEvidence]) -> str:
    """asked | got | proof, without the baselines, which have nothing to prove."""
    rows = [
        (f"{line.slot}={line.layer}", str(line.evidence.status), line.evidence.text)
        for line in seen
        if line.evidence.text != "baseline"
    ]
    rows = [("asked", "got", "proof"), *rows]
    first, second = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
    return "\n".join(f"{row[0]:<{first}}  {row[1]:<{second}}  {row[2]}" for row in rows)
