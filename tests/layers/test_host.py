"""The host's part of a step: no garbage collection inside it, threads and memory on the right node, pinned buffers used in turn."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoughts.data.device import as_tensor
from gptoughts.data.prefetch import Ring
from gptoughts.hardware.machine import read
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG, host_threads
from gptoughts.planning.evidence import Status
from gptoughts.planning.layer import Case
from tests.support.engines import engine_of, plan_of, recipe_of, steps, watched

THREADS = CATALOG["threads"]
OPTIONS = {"threads": None, "collect_every": 5000}


@pytest.fixture(autouse=True)
def as_asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As the plan's environment would have it; and a collector that is left as it was found."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    gc.unfreeze()  # what lies frozen is the layer's doing, here
    before, ours = gc.isenabled(), len(gc.callbacks)
    yield
    assert gc.isenabled() == before and gc.get_freeze_count() == 0
    assert len(gc.callbacks) <= ours + 1  # hypothesis puts one of its own there


# --- garbage collection


def test_the_collector_is_off_after_the_first_update_and_back_afterwards() -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, {"host": "threads", "host.threads": 1})) as engine:
        assert gc.isenabled()
        trace = watched(engine)
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        proof = THREADS.verify(engine, trace, OPTIONS)
    assert proof.status is Status.ACTIVE
    assert "garbage collection paused, none in the step" in proof.text
    assert proof.figures["collections"] == 0


def test_an_engine_whose_collector_runs_is_inactive() -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe)) as engine:
        proof = THREADS.verify(engine, watched(engine), OPTIONS)
    assert proof.status is Status.INACTIVE
    assert "the collector is on" in proof.text


def test_a_collection_inside_the_watched_step_is_inactive() -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, {"host": "threads", "host.threads": 1})) as engine:
        inner = engine._hooks["clip"]

        def clip() -> torch.Tensor:
            gc.collect()
            return inner()

        steps(engine, 1)
        engine.replace("clip", clip)
        proof = THREADS.verify(engine, watched(engine, warm=0), OPTIONS)
    assert proof.status is Status.INACTIVE
    assert proof.text == "garbage collections in the step: 1; the collector is paused"


def test_garbage_is_collected_between_updates_and_is_no_collection_inside() -> None:
    recipe = recipe_of("modern")

    class Cycle:
        def __init__(self) -> None:
            self.me = self

    gone: list[int] = []
    with engine_of(recipe, plan_of(recipe, {"host": "threads", "host.threads": 1, "host.collect_every": 2})) as engine:
        steps(engine, 1)
        cycle = Cycle()
        import weakref

        weakref.finalize(cycle, gone.append, 1)
        del cycle
        assert gone == []
        trace = watched(engine, warm=0)  # the second update: ours
        assert gone == [1]
        assert THREADS.verify(engine, trace, OPTIONS).status is Status.ACTIVE


# --- node of the GPU


def test_ranks_go_to_the_node_of_their_gpu() -> None:
    recipe, machine = recipe_of("modern"), read("tests/machines/h100x8.json")
    nodes = set()
    for rank in range(8):
        case = Case(machine, SimpleNamespace(), recipe, World(rank, rank, 8, 8))  # type: ignore[arg-type]
        variables = THREADS.environment(case, OPTIONS)
        assert variables["GPTOUGHTS_NUMA_NODE"] == str(machine.gpus[rank].numa_node)
        nodes.add(variables["GPTOUGHTS_NUMA_NODE"])
    assert len(nodes) == machine.cpu.numa_nodes


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_this_process_is_bound_and_let_go() -> None:
    before = os.sched_getaffinity(0)
    undo = host_threads._bind("0")
    try:
        assert os.sched_getaffinity(0) <= host_threads._cores_of(0)
    finally:
        undo()
    assert os.sched_getaffinity(0) == before


# --- the ring: no stand-in for a device, but a thread that reads a buffer late, as a copy engine does


class Copier:
    """Copies buffers some time after it was asked to, in order, as a side stream does."""

    def __init__(self, delays: list[float]) -> None:
        self.results: list[dict[str, torch.Tensor]] = []
        self._delays, self._last = iter(delays), threading.Event()
        self._last.set()

    def copy(self, buffers: dict[str, torch.Tensor]) -> Any:
        before, over, delay = self._last, threading.Event(), next(self._delays)
        result: dict[str, torch.Tensor] = {}
        self.results.append(result)

        def run() -> None:
            before.wait()
            time.sleep(delay)
            result.update({key: value.clone() for key, value in buffers.items()})
            over.set()

        self._last = over
        threading.Thread(target=run).start()
        return over.wait


SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 9), st.sampled_from([np.uint16, np.uint32, np.int64]))
BATCHES = st.lists(SHAPES, min_size=1, max_size=12)


def pageable(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


@settings(max_examples=25, deadline=None)
@given(BATCHES, st.integers(1, 4), st.data())
def test_every_batch_arrives_whole_however_late_it_is_copied(shapes: Any, slots: int, data: Any) -> None:
    delays = data.draw(st.lists(st.sampled_from([0.0, 0.002]), min_size=len(shapes), max_size=len(shapes)))
    copier, ring, sent = Copier(delays), Ring(slots, pageable), []
    for number, (rows, columns, kind) in enumerate(shapes, 1):
        batch = {"input_ids": as_tensor(np.full((rows, columns), number, dtype=kind)), "mask": torch.ones(rows) * number}
        ring.sent(copier.copy(ring.filled(batch)))
        sent.append(batch)
    copier._last.wait()
    for batch, result in zip(sent, copier.results, strict=True):
        assert all(torch.equal(batch[key], result[key]) and batch[key].dtype == result[key].dtype for key in batch)


def test_a_ring_that_did_not_wait_would_mix_batches() -> None:
    """The control: the same with nobody waiting."""
    copier, ring = Copier([0.05, 0.0]), Ring(1, pageable)
    for number in (1, 2):
        copier.copy(ring.filled({"x": torch.full((3,), number)}))
        ring.sent(lambda: None)
    copier._last.wait()
    assert copier.results[0]["x"].tolist() == [2, 2, 2]


def test_buffers_are_made_once_and_again_only_for_larger_batches() -> None:
    ring = Ring(3, pageable)
    for number in range(30):
        filled = ring.filled({"input_ids": torch.full((2, 1 + number % 5), number, dtype=torch.uint16)})
        assert filled["input_ids"].dtype == torch.uint16
        assert filled["input_ids"].int().unique().tolist() == [number]
        ring.sent(lambda: None)
    assert ring.allocated <= 9
    before = ring.allocated
    for _ in range(30):
        ring.filled({"input_ids": torch.zeros(2, 5, dtype=torch.uint16)})
        ring.sent(lambda: None)
    assert ring.allocated - before <= 3


# --- the allocator's own word


def snapshot_of(*expandable: bool) -> list[dict[str, Any]]:
    """Segments in the form of torch.cuda.memory_snapshot()."""
    return [
        {"device": 0, "address": number, "total_size": 2**21, "stream": 0, "segment_type": "large", "is_expandable": grows, "blocks": []}
        for number, grows in enumerate(expandable, 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("grows", "status"), [((True, False), Status.ACTIVE), ((False, False), Status.INACTIVE), ((), Status.INACTIVE)]
)
def test_segments_that_can_grow_are_the_proof(grows: tuple[bool, ...], status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.memory, "memory_snapshot", lambda *_, **__: snapshot_of(*grows))
    engine = SimpleNamespace(device=torch.device("cuda"))
    assert CATALOG["expandable"].verify(engine, watched_nothing(), {}).status is status


def watched_nothing() -> Any:
    return SimpleNamespace(kernels={}, call_counts={})
