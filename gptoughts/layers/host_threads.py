"""One compute thread per usable core and rank, on the cores and memory of the rank's NUMA node; no garbage collection inside steps.

Several ranks on one box otherwise start as many threads each as the box has cores, and fight. It hurts on a box shared with other
jobs: with more threads than free cores a step can take several times as long; lower `threads` there.
Bound memory is allocated on the node of the cores first (Linux `set_mempolicy`, preferred, never strict).

Python's garbage collection is paused from the first update on, and runs between updates only, every `collect_every`; what lives by then is
not walked again. Collections otherwise come when they like and walk every object: pauses of about half a second (karpathy/nanochat,
scripts/base_train.py). It hurts where your own code makes reference cycles that hold tensors: they are freed that much later; lower
`collect_every` there.
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
    """The asked number, or an even share of the usable cores; beside a GPU, which does the work, no more than 8."""
    share = max(1, case.machine.cpu.usable_cores // case.world.local_world_size)
    return options["threads"] or (min(share, MOST_BESIDE_A_GPU) if case.on_gpu else share)


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """More threads than cores cannot help."""
    cores = case.machine.cpu.usable_cores
    if options["threads"] and options["threads"] > cores:
        yield unsupported(f"{options['threads']} threads asked for on {cores} usable cores")


def environment(case: Case, options: Options) -> Mapping[str, str]:
    """OpenMP reads its number of threads once, when torch is loaded."""
    variables = {"OMP_NUM_THREADS": str(threads_per_rank(case, options))}
    node = _node(case)
    return variables | ({"GPTOUGHTS_NUMA_NODE": str(node)} if node is not None else {})


def _node(case: Case) -> int | None:
    """NUMA node of this rank's GPU, or an even spread of ranks over nodes; None on a box with one node."""
    nodes = case.machine.cpu.numa_nodes
    if nodes < 2:
        return None
    if case.machine.gpus:
        gpu = case.machine.gpus[case.world.local_rank % len(case.machine.gpus)]
        return gpu.numa_node
    return case.world.local_rank * nodes // case.world.local_world_size


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Set torch's threads to what the environment says, bind to the NUMA node that it names, and keep the collector out of steps."""
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
    """Python's garbage collector, off from the first update on, and run by us between two updates."""

    def __init__(self, engine: Engine, every: int) -> None:
        self.engine, self.every, self.updates, self.ours = engine, every, 0, False

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Wrap `step`; on leaving, the collector is as it was found and owns every object again."""
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
        """Set aside what lives after the first update; collect after each so many."""
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
        """Called by Python around every collection; those that we did not ask for are marked."""
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
    """Prefer memory of the nodes in the bit mask, or of any where it is 0. False where containers forbid the call."""
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
    """Torch computes with the asked number of threads, on cores of the asked node, and no collection began inside the step."""
    import torch

    threads = torch.get_num_threads()
    if threads != _asked():
        return inactive(f"{_told(threads)}, asked for {_asked()}", threads=threads)
    node = os.environ.get("GPTOUGHTS_NUMA_NODE")
    if node is not None and hasattr(os, "sched_getaffinity") and not os.sched_getaffinity(0) <= _cores_of(int(node)):
        return inactive(f"runs on cores outside NUMA node {node}", threads=threads)
    collections, frozen = trace.call_counts.get(INSIDE, 0), gc.get_freeze_count()
    figures = {"threads": threads, "collections": collections, "frozen_objects": frozen}
    if collections or gc.isenabled() or not frozen:
        state = "on" if gc.isenabled() else "paused" if frozen else "off, but was not told to pass over what lives (gc.freeze)"
        return inactive(f"garbage collections in the step: {collections}; the collector is {state}", **figures)
    kept = ", garbage collection paused, none in the step"
    if node is None:
        return active(f"{_told(threads)}{kept}", **figures)
    memory = (
        "memory preferred there" if _memory_is_preferred(int(node)) else "memory not bound: set_mempolicy is not permitted here"
    )
    return active(f"{_told(threads)} on NUMA node {node}, {memory}{kept}", **figures)


def _told(threads: int) -> str:
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
        "threads": Option(None, "threads per rank; an even share of the usable cores if not set", int),
        "collect_every": Option(COLLECT_EVERY, "updates between two garbage collections; 1 collects after each", int),
    },
    warmup_steps=1,
    measured="docs/measurements/cpu/layers.json on a CPU; not measured beside a GPU",
)
