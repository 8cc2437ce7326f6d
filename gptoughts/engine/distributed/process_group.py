"""Open and close the process group of a run."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from gptoughts.engine.distributed import mpi
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.distributed.rendezvous import collective_limit, meet
from gptoughts.hardware.world import World


@contextmanager
def process_group(world: World, device: torch.device, collectives: str = "auto") -> Iterator[Ranks]:
    """Open the process group for the block; a single process opens none.

    `collectives` is auto (NCCL on GPUs, gloo on CPUs), mpi, or the name of a backend of torch.
    Raises RunError if ranks do not meet within the limit.
    """
    if world.world_size == 1:
        yield Ranks(world, device)
        return
    if collectives == "mpi":
        with mpi.open_group(world):
            yield Ranks(world, device)
        return
    backend = collectives if collectives != "auto" else "nccl" if device.type == "cuda" else "gloo"
    if world.on_one_machine:
        _use_loopback()
    dist.init_process_group(
        backend,
        store=meet(world).group_store(),
        rank=world.rank,
        world_size=world.world_size,
        timeout=collective_limit(),
        device_id=device if backend == "nccl" else None,
    )
    try:
        yield Ranks(world, device)
    finally:
        dist.destroy_process_group()


def _use_loopback() -> None:
    """Let the sockets of gloo and NCCL listen on the loopback interface alone, unless the user chose an interface."""
    interface = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if interface is not None:
            os.environ.setdefault(variable, interface)


@contextmanager
def own_group(device: torch.device) -> Iterator[None]:
    """Open a process group of this process alone for the block, with collectives on CPU tensors too; keep one that exists."""
    if dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    _use_loopback()
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
