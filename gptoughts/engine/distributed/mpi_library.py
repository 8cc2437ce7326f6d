"""Load mpi4py and its MPI library, without starting MPI. Only this file imports mpi4py; it does not load torch."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from gptoughts.errors import ConfigError
from gptoughts.hardware.world import World

LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
"""One of these is set in a process that mpirun or srun started: by OpenMPI, MPICH and Intel MPI, PMIx."""
START = "mpirun -np 2 gptoughts train RECIPE --collectives mpi"


def require_mpi(world: World, environment: Mapping[str, str]) -> None:
    """Raise ConfigError outside mpirun or where mpi4py or the MPI library is missing. Does not start MPI."""
    if not any(name in environment for name in LAUNCHER_VARIABLES):
        raise ConfigError(
            "--collectives mpi: not started by mpirun",
            found=f"launcher {world.launcher}, {world.world_size} ranks, none of {', '.join(LAUNCHER_VARIABLES)}",
            fix=START,
        )
    library()


def library() -> Any:
    """Return the module mpi4py.MPI without starting MPI. Raises ConfigError where it is missing."""
    if find_spec("mpi4py") is None:
        raise ConfigError("--collectives mpi: package not installed: mpi4py", fix="pip install 'gptoughts[mpi]'")
    import mpi4py

    # We start MPI, and end it unless a rank failed: ending waits for all ranks, so a failed rank would hang there.
    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # which one depends on how mpi4py was built
        raise ConfigError(
            "--collectives mpi: mpi4py cannot load the MPI library",
            found=" ".join(str(error).split())[:300],
            fix="apt-get install openmpi-bin libopenmpi3, or the MPI module of your cluster",
        ) from error
    return MPI


def supports_cuda(mpi: Any) -> bool:
    """Return whether the MPI library reads GPU memory. OpenMPI answers; others count as not."""
    try:
        query = ctypes.CDLL(mpi.__file__).MPIX_Query_cuda_support
    except (OSError, AttributeError):
        return False
    return bool(query())  # MPI: asks whether the library was built for CUDA
