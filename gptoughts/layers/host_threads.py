"""One compute thread per usable core and rank, on the cores and memory of the rank's NUMA node; no garbage collection inside steps.

Without it each rank on a machine starts as many threads as the machine has cores, and they compete. It hurts on a machine shared with
other jobs: with more threads than free cores a step can take several times as long; lower `threads` there.
Memory is allocated on the NUMA node of the cores first (Linux `set_mempolicy`, preferred, not strict).

Python's garbage collection is paused from the first update on and runs only between updates, every `collect_every`; objects alive at
the first update are frozen (`gc.freeze`). Otherwise a collection can start at any time and traverses every object: pauses of about half
a second (karpathy/nanochat, scripts/base_train.py). It hurts where your own code creates reference cycles that hold tensors: they are
freed later; lower `collect_every` there.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gptoughts.planning.layer import (
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

_SET_MEMPOLICY, _GET_MEMPOLICY = {"x86_64": (238, 239), "aarch64": (237, 236)}.get(os.uname().machine, (None, None))
_DEFAULT, _PREFERRED = 0, 1
MOST_BESIDE_A_GPU = 8
COLLECT_EVERY = 5000  # karpathy/nanochat, scripts/base_train.py
INSIDE = "threads: collections"


def threads_per_rank(case: Case, options: Options) -> int:
    """Return the requested number, or an even share of the usable cores; with a GPU at most 8."""
    share = max(1, case.machine.cpu.usable_cores // case.world.local_world_size)
    return options["threads"] or (min(share, MOST_BESIDE_A_GPU) if case.on_gpu else share)


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """No more threads than usable cores."""
    cores = case.machine.cpu.usable_cores
    if options["threads"] and options["threads"] > cores:
        yield unsupported(f"{options['threads']} threads requested, {cores} usable cores")


def environment(case: Case, options: Options) -> Mapping[str, str]:
    """Return the thread count, which OpenMP reads once when torch is loaded, and the NUMA node."""
    variables = {"OMP_NUM_THREADS": str(threads_per_rank(case, options))}
    node = _node(case)
    return variables | ({"GPTOUGHTS_NUMA_NODE": str(node)} if node is not None else {})


def _node(case: Case) -> int | None:
    """Return the NUMA node of this rank's GPU, or spread ranks evenly over nodes; None on a machine with one node."""
    nodes = case.machine.cpu.numa_nodes
    if nodes < 2:
        return None
    if case.machine.gpus:
        gpu = case.machine.gpus[case.world.local_rank % len(case.machine.gpus)]
        return gpu.numa_node
    return case.world.local_rank * nodes // case.world.local_world_size


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Set torch's threads and NUMA node from the environment, and keep garbage collection out of steps."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(_asked())
    undo = _bind(os.environ.get("GPTOUGHTS_NUMA_NODE"))
    try:
        with _Collector(engine, options["collect_every"]).taken():
            yield
    finally:
        undo()
        torch.set_num_threads(before)


class _Collector:
    """Garbage collector that is disabled from the first update on and run between updates."""

    def __init__(self, engine: Engine, every: int) -> None:
        self.engine, self.every, self.updates, self.ours = engine, every, 0, False

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wrap `step`; on exit restore the collector and unfreeze all objects."""
        was_enabled = gc.isenabled()
        undo = self.engine.wrap("step", self.step)
        gc.callbacks.append(self.count)
        try:
            yield
        finally:
            undo()
            gc.callbacks.remove(self.count)
            if self.updates:
                gc.unfreeze()
            if was_enabled:
                gc.enable()

    def step(self, inner: Callable[[], bool]) -> bool:
        """Freeze live objects after the first update; collect after every `every` updates."""
        updated = inner()
        self.updates += updated
        if updated and (self.updates == 1 or self.updates % self.every == 0):
            self.ours = True
            gc.collect()
            self.ours = False
        if updated and self.updates == 1:
            gc.freeze()
            gc.disable()
        return updated

    def count(self, phase: str, info: Mapping[str, int]) -> None:
        """Count collections that this layer did not start. Called by Python around every collection."""
        if phase == "start" and not self.ours:
            self.engine.counters.call_counts[INSIDE] += 1


def _asked() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", "1"))


def _bind(node: str | None) -> Any:
    if node is None or not hasattr(os, "sched_setaffinity"):
        return lambda: None
    before = os.sched_getaffinity(0)
    cores = before & _cores_of(int(node))
    if cores:
        os.sched_setaffinity(0, cores)
    _prefer_memory_of(1 << int(node))

    def undo() -> None:
        os.sched_setaffinity(0, before)
        _prefer_memory_of(0)

    return undo


def _cores_of(node: int) -> set[int]:
    with open(f"/sys/devices/system/node/node{node}/cpulist", encoding="ascii") as file:
        parts = [part.split("-") for part in file.read().strip().split(",") if part]
    return {core for part in parts for core in range(int(part[0]), int(part[-1]) + 1)}


def _prefer_memory_of(nodes: int) -> bool:
    """Prefer memory of the nodes in the bit mask, or of any node for 0. Return False where containers forbid the call."""
    if _SET_MEMPOLICY is None:
        return False
    mask = ctypes.c_ulong(nodes)
    mode, words = (_PREFERRED, (ctypes.byref(mask), 64)) if nodes else (_DEFAULT, (None, 0))
    return bool(ctypes.CDLL(None, use_errno=True).syscall(_SET_MEMPOLICY, mode, *words) == 0)


def _memory_is_preferred(node: int) -> bool:
    if _GET_MEMPOLICY is None:
        return False
    mode, mask = ctypes.c_int(), ctypes.c_ulong()
    failed = ctypes.CDLL(None, use_errno=True).syscall(_GET_MEMPOLICY, ctypes.byref(mode), ctypes.byref(mask), 64, None, 0)
    return not failed and mode.value == _PREFERRED and bool(mask.value & (1 << node))


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require the requested threads, cores of the requested node, and no garbage collection inside the step."""
    import torch

    threads = torch.get_num_threads()
    if threads != _asked():
        return inactive(f"{_threads(threads)}, requested {_asked()}", threads=threads)
    node = os.environ.get("GPTOUGHTS_NUMA_NODE")
    if node is not None and hasattr(os, "sched_getaffinity") and not os.sched_getaffinity(0) <= _cores_of(int(node)):
        return inactive(f"runs on cores outside NUMA node {node}", threads=threads)
    collections, frozen = trace.call_counts.get(INSIDE, 0), gc.get_freeze_count()
    figures = {"threads": threads, "collections": collections, "frozen_objects": frozen}
    if collections or gc.isenabled() or not frozen:
        state = "on" if gc.isenabled() else "paused" if frozen else "off, and no object is frozen (gc.freeze)"
        return inactive(f"garbage collections in the step: {collections}; the collector is {state}", **figures)
    kept = ", garbage collection paused, none in the step"
    if node is None:
        return active(f"{_threads(threads)}{kept}", **figures)
    memory = "memory preferred there" if _memory_is_preferred(int(node)) else "memory not bound: set_mempolicy is not permitted"
    return active(f"{_threads(threads)} on NUMA node {node}, {memory}{kept}", **figures)


def _threads(threads: int) -> str:
    return f"{threads} thread" if threads == 1 else f"{threads} threads"


LAYER = Layer(
    name="threads",
    slot="host",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    unmet=unmet,
    environment=environment,
    wraps=("step",),
    options={
        "threads": Option(None, "threads per rank; default an even share of the usable cores", int),
        "collect_every": Option(COLLECT_EVERY, "updates between garbage collections; 1 collects after each", int),
    },
    warmup_steps=1,
    measured="docs/measurements/cpu/layers.json on a CPU; not measured beside a GPU",
)
