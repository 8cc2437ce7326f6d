"""Open a process group whose collectives run through MPI; the collectives are in `mpi_group.py`.

MPI starts when the group opens, after the command line may have restarted the process, and ends when the process ends.
"""

from __future__ import annotations

import atexit
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from gptoughts.engine.distributed.mpi_group import BACKEND, MPIGroup
from gptoughts.engine.distributed.mpi_library import START, library, require_mpi, supports_cuda
from gptoughts.engine.distributed.mpi_worker import Worker
from gptoughts.errors import ConfigError
from gptoughts.hardware.world import World

LAST_WORDS_SECONDS = 1.0
"""Time that other ranks get to print their own error before an abort ends them."""


class _Process:
    """What this process has of MPI, which starts once and cannot start again."""

    worker: Worker | None = None
    failed: int | None = None
    """Exit code of the error that ended a group; None while there is none."""


@contextmanager
def open_group(world: World) -> Iterator[None]:
    """Start MPI and open torch's process group over it for the block.

    An exception in the block ends the ranks of the whole job when this process exits. Raises ConfigError as `require_mpi`, and
    where `world` is not the rank and size of MPI.COMM_WORLD.
    """
    require_mpi(world, os.environ)
    mpi = library()
    worker = _start(mpi)
    try:
        _check_world(mpi, world)
        _register(mpi, worker)
        # The variables that other backends meet by are not needed: MPI already connects the ranks.
        store = worker.run(lambda: _meeting_store(mpi, world)).wait()
        dist.init_process_group(BACKEND, store=store, rank=world.rank, world_size=world.world_size)
        try:
            yield
            worker.run(lambda: None).wait()  # collectives that are still running end before the group does
        finally:
            dist.destroy_process_group()
    except BaseException as error:
        code = getattr(error, "exit_code", 1)
        _Process.failed = code if isinstance(code, int) and code else 1
        raise


def _start(mpi: Any) -> Worker:
    """Initialize MPI once per process and start the thread that calls it. Raises ConfigError where threads may not call it."""
    if _Process.worker is not None:
        return _Process.worker
    # A waiting rank of OpenMPI gives its core to the thread that computes. Read when MPI starts; a value of the user's wins.
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    if not mpi.Is_initialized():  # MPI: asks whether a caller of ours has started it
        mpi.Init_thread(mpi.THREAD_MULTIPLE)  # MPI: starts MPI; calls from threads are allowed
    level = mpi.Query_thread()  # MPI: the thread level that the library grants
    if level < mpi.THREAD_SERIALIZED:
        raise ConfigError(
            "--collectives mpi: this MPI library allows calls from the main thread only",
            found=f"thread level {level} of {mpi.get_vendor()[0]}, required: {mpi.THREAD_SERIALIZED} (MPI_THREAD_SERIALIZED)",
            fix="an MPI library built with threads, or --collectives gloo",
        )
    _Process.worker = Worker()
    atexit.register(_stop, mpi, _Process.worker)
    return _Process.worker


def _stop(mpi: Any, worker: Worker) -> None:
    """End MPI at exit; after an error, end the job, so that no rank waits for this one."""
    if mpi.Is_finalized():  # MPI: asks whether a caller of ours has ended it
        return
    if _Process.failed is not None:
        time.sleep(LAST_WORDS_SECONDS)
        mpi.COMM_WORLD.Abort(_Process.failed)  # MPI: kills all ranks; mpirun exits with this code
    worker.close()
    mpi.Finalize()  # MPI: ends MPI after every rank has come here


def _check_world(mpi: Any, world: World) -> None:
    rank, size = mpi.COMM_WORLD.Get_rank(), mpi.COMM_WORLD.Get_size()  # MPI: this process's rank, and how many there are
    if (rank, size) != (world.rank, world.world_size):
        raise ConfigError(
            "--collectives mpi: the environment and MPI.COMM_WORLD contradict each other",
            found=f"rank {world.rank} of {world.world_size} ({world.launcher}), and rank {rank} of {size} in MPI.COMM_WORLD",
            fix=f"{START}, with the mpirun of the MPI library that mpi4py loads ({mpi.get_vendor()[0]})",
        )


def _register(mpi: Any, worker: Worker) -> None:
    """Make the backend known to torch. `dist.new_group` and device meshes then make MPI groups too."""
    aware = supports_cuda(mpi)

    def create(options: Any, backend_options: Any) -> MPIGroup:
        made: list[MPIGroup] = []

        def make() -> None:
            comm = _communicator(mpi, list(options.global_ranks_in_group))
            made.append(MPIGroup(mpi, comm, worker, str(options.group_id), aware))

        worker.run(make).wait()
        return made[0]

    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu", "cuda"])


def _communicator(mpi: Any, members: list[int]) -> Any:
    """Return a communicator of the given ranks; none given are all."""
    world = mpi.COMM_WORLD
    if not members:
        return world.Dup()  # MPI: a communicator of all ranks, apart from other users of MPI
    group = world.Get_group().Incl(members)  # MPI: names the members of the new group
    return world.Create_group(group)  # MPI: a communicator of the members, who alone make this call


def _meeting_store(mpi: Any, world: World) -> dist.Store:
    """Return a key-value store of all ranks, for torch's own notes: a file on one machine, else a socket of rank 0."""
    comm = mpi.COMM_WORLD
    one_machine = world.local_world_size == world.world_size
    place, store = "", None
    if world.rank == 0:
        if one_machine:
            handle, place = tempfile.mkstemp(prefix="gptoughts-mpi-")  # the last rank that closes the store removes it
            os.close(handle)
        else:
            store = dist.TCPStore(socket.gethostname(), 0, world.world_size, is_master=True, wait_for_workers=False)
            place = f"{socket.gethostname()} {store.port}"
    buffer = bytearray(place.encode().ljust(1024, b"\0"))
    comm.Bcast([buffer, mpi.BYTE], root=0)  # MPI: rank 0 sends the place of the store to all
    place = bytes(buffer).rstrip(b"\0").decode()
    if one_machine:
        return dist.FileStore(place, world.world_size)
    if store is None:
        host, port = place.split()
        store = dist.TCPStore(host, int(port), world.world_size, is_master=False)
    return store
