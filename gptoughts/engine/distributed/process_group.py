"""Open and close the process group of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.hardware.world import World


@contextmanager
def process_group(world: World, device: torch.device, collectives: str = "auto") -> Iterator[Ranks]:
    """Open the process group for the block; a single process opens none.

    `collectives` is auto (NCCL on GPUs, gloo on CPUs) or the name of a backend.
    """
    if world.world_size == 1:
        yield Ranks(world, device)
        return
    backend = collectives if collectives != "auto" else "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=10)
    dist.init_process_group(
        backend,
        store=_store_of_restart(world, timeout),
        rank=world.rank,
        world_size=world.world_size,
        timeout=timeout,
        device_id=device if backend == "nccl" else None,
    )
    try:
        yield Ranks(world, device)
    finally:
        dist.destroy_process_group()


def _store_of_restart(world: World, timeout: timedelta) -> dist.Store | None:
    """Return a store for ranks that torchrun restarted, None for its first attempt.

    torchrun keeps its store, where ranks would find the addresses of the processes before (torch 2.13).
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0":
        return None
    store, _, _ = next(dist.rendezvous("env://", world.rank, world.world_size, timeout=timeout))
    return dist.PrefixStore(f"attempt/{attempt}", store)
