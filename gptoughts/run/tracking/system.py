"""System metrics: GPUs through NVML, processes and nodes through /proc, sampled on a thread of one rank per node.

Ranks learn once, before the first step, who samples. From then on the sampling threads of other nodes leave their newest sample in the
store of the process group, on a connection of their own, and the first rank's thread reads them there: no collective, and nothing that
the training thread waits for. A node that does not answer is left out of the sample.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from gptoughts.console import LOGGER, note
from gptoughts.engine.callback import Callback
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine
from gptoughts.engine.progress import Progress
from gptoughts.hardware.gpu_sampler import GpuSampler
from gptoughts.hardware.nvml import opened, read_gpus
from gptoughts.hardware.process_sampler import ProcessSampler
from gptoughts.hardware.world import World
from gptoughts.models.torch_internals import default_store
from gptoughts.run.tracking.sink import Sink

STALE_PERIODS = 3
"""Periods after which the sample of another node is left out."""
END_SECONDS = 5.0
"""Longest time that the end of a run waits for the last sample."""
Readings = dict[str, dict[int, Any]]
"""Key -> rank -> value."""


@dataclass(frozen=True)
class Peer:
    """A rank, as its sampler needs to know it."""

    node: str
    """Host name and process namespace, in which `process` is its number."""
    process: int
    local_rank: int
    own_gpus: bool
    token: str
    """Random; the first rank's names the place of the samples in the store, which outlives runs."""


class SystemMetrics(Callback):
    """Samples every `seconds` and sends the samples of all nodes to the first rank's sinks. A callback, to know the step."""

    def __init__(self, ranks: Ranks, sinks: Sink, seconds: float, samples_before: int = 0) -> None:
        self._ranks, self._sinks, self._seconds = ranks, sinks, seconds
        self._index, self._step = samples_before, 0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: Any = None
        """Of the process group, where several nodes sample."""

    def on_start(self, engine: Engine, progress: Progress) -> None:
        """Find out which ranks sample, once and together, and start the thread on those."""
        if self._seconds <= 0:
            return
        self._step = progress.step
        world = self._ranks.world
        mine = Peer(_node(), os.getpid(), world.local_rank, world.own_gpus, secrets.token_hex(6))
        peers = [Peer(**json.loads(text)) for text in self._ranks.texts(json.dumps(asdict(mine)))]
        self._samplers = sampling_ranks(peers)
        if world.rank not in self._samplers:
            return
        self._peers = peers
        if len(self._samplers) > 1:
            self._store = dist.PrefixStore(f"system/{peers[0].token}", default_store().clone())
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
        self._thread.start()

    def due(self, step: int, last: bool) -> bool:
        """Remember the step; never due."""
        self._step = step
        return False

    def close(self) -> None:
        """Take a last sample and end the thread."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(END_SECONDS)
            self._thread = None

    # The thread.

    def _work(self) -> None:
        try:
            with ExitStack() as stack:
                node = NodeSampler(self._ranks.world, self._peers, stack)
                stopping = False
                while not stopping:
                    began = time.monotonic()
                    self._share(node.read())
                    stopping = self._stopping.wait(max(0.0, self._seconds - (time.monotonic() - began)))
                self._share(node.read())
        except Exception as error:
            LOGGER.warning("system metrics ended: %s: %s", type(error).__name__, error)

    def _share(self, readings: Readings) -> None:
        """Send a sample to the sinks, or leave it in the store for the first rank."""
        now = time.time()
        if not self._ranks.first:
            assert self._store is not None, "several ranks share a store"
            self._store.set(str(self._ranks.world.rank), json.dumps({"time": now, "readings": readings}))
            return
        for other in self._others(now):
            for key, values in other.items():
                readings.setdefault(key, {}).update({int(rank): value for rank, value in values.items()})
        self._index += 1
        self._sinks.sample(self._index, {"time": now, "step": self._step, **summary(readings)})

    def _others(self, now: float) -> list[dict[str, dict[str, Any]]]:
        found = []
        for rank in self._samplers[1:]:
            assert self._store is not None, "several ranks share a store"
            with suppress(RuntimeError):  # the store is gone with a lost rank, which the failure watch reports
                if self._store.check([str(rank)]):
                    sample = json.loads(self._store.get(str(rank)))
                    if now - sample["time"] < STALE_PERIODS * self._seconds:
                        found.append(sample["readings"])
        return found


class NodeSampler:
    """Reads the GPUs and processes of the ranks that this rank samples for."""

    def __init__(self, world: World, peers: Sequence[Peer], stack: ExitStack) -> None:
        mine = peers[world.rank]
        self._rank = world.rank
        alone = mine.own_gpus
        ranks = [world.rank] if alone else [rank for rank, peer in enumerate(peers) if peer.node == mine.node]
        self._ranks_of = {peers[rank].process: rank for rank in ranks}
        self._processes = ProcessSampler(self._ranks_of)
        visible = [gpu.uuid for gpu in read_gpus(os.environ).gpus]
        uuids = {rank: visible[peers[rank].local_rank % len(visible)] for rank in ranks} if visible else {}
        self._gpus = GpuSampler(stack.enter_context(opened()), uuids, note) if uuids else None

    def read(self) -> Readings:
        """Return the newest reading of every key, by rank; figures of the node by this rank."""
        found: Readings = {}
        for rank, values in (self._gpus.read() if self._gpus else {}).items():
            for key, value in values.items():
                found.setdefault(f"gpu/{key}", {})[rank] = value
        for process, values in self._processes.read().items():
            for key, value in values.items():
                group = "cpu" if key == "process_percent" else "memory"
                found.setdefault(f"{group}/{key}", {})[self._ranks_of[process]] = value
        for key, value in self._processes.node().items():
            found.setdefault(f"cpu/{key}" if key == "load" else f"memory/{key}", {})[self._rank] = value
        return found


def sampling_ranks(peers: Sequence[Peer]) -> list[int]:
    """Return the first rank of every node, and every rank that sees only its own GPUs."""
    nodes = [peer.node for peer in peers]
    return [rank for rank, peer in enumerate(peers) if peer.own_gpus or nodes.index(peer.node) == rank]


def summary(readings: Readings) -> dict[str, Any]:
    """Return mean, minimum and maximum of each key, and the ranks of the last two.

    Reasons for throttling are united and energies added. Figures of one process or node stay single.
    """
    gpus = {rank for key, values in readings.items() if key.startswith("gpu/") for rank in values}
    row: dict[str, Any] = {"gpu/count": len(gpus)} if gpus else {}
    for key, values in readings.items():
        if key == "gpu/throttle":
            row[key] = sorted({reason for reasons in values.values() for reason in reasons})
        elif key == "gpu/energy_joules":
            row[key] = sum(values.values())
        else:
            row |= _spread(key, values)
    return row


def _spread(key: str, values: Mapping[int, float]) -> dict[str, float]:
    mean = {key: sum(values.values()) / len(values)}
    if len(values) < 2 and not key.startswith("gpu/"):
        return mean
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return {
        **mean,
        f"{key}_min": values[low],
        f"{key}_max": values[high],
        f"{key}_min_rank": low,
        f"{key}_max_rank": high,
    }


def _node() -> str:
    """Return the host name and the process namespace, in which a process number means the same process."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
