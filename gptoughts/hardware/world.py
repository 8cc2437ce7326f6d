"""Rank, local rank and number of processes, from the variables that a launcher sets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from json import dumps
from typing import Any, ClassVar

from pydantic import ConfigDict, NonNegativeInt

from gptoughts.errors import ConfigError
from gptoughts.hardware.records import STRICT, validate


@dataclass(frozen=True)
class World:
    """Rank and world size of this process; `launcher` is `single` or the name of a `Launcher`."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    rank: NonNegativeInt = 0
    local_rank: NonNegativeInt = 0
    world_size: NonNegativeInt = 1
    local_world_size: NonNegativeInt = 1
    launcher: str = "single"
    own_gpus: bool = False
    """Whether this rank sees its own GPUs alone, as with `srun --gpus-per-task=1`, and not all of its machine."""

    @property
    def launched(self) -> bool:
        """Whether a launcher started this process as one of its ranks."""
        return self.launcher != "single"

    @property
    def on_one_machine(self) -> bool:
        """Whether all ranks run on this machine."""
        return self.local_world_size == self.world_size

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers and strings."""
        return asdict(self)

    @staticmethod
    def from_json(value: object, source: str = "world") -> World:
        """Return the world of a JSON value. Raises ConfigError as `Machine.from_json`."""
        return validate(World, dumps(value), source)


@dataclass(frozen=True)
class Launcher:
    """A program that starts ranks, and the variables in which it leaves their numbers."""

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str
    present: tuple[str, ...]
    """Variables of which one shows that this launcher started the process."""

    @property
    def variables(self) -> tuple[str, str, str, str]:
        """Names for rank, world size, local rank and local world size."""
        return self.rank, self.world_size, self.local_rank, self.local_world_size

    def found(self, environment: Mapping[str, str]) -> str:
        """Return `NAME=value, ...` of the variables that are set."""
        return ", ".join(f"{name}={environment[name]}" for name in self.variables if name in environment)


def _launcher(name: str, rank: str, world_size: str, local_rank: str, local_world_size: str, mark: str = "") -> Launcher:
    variables = rank, world_size, local_rank, local_world_size
    return Launcher(name, *variables, present=(mark,) if mark else variables)


TORCHRUN = _launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
OPENMPI = _launcher(
    "openmpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
)
MPICH = _launcher("mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
# A batch script of sbatch also has SLURM_PROCID and SLURM_NTASKS, but is one process; SLURM_STEP_* come from srun alone.
SRUN = _launcher(
    "srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS"
)
LAUNCHERS = (TORCHRUN, OPENMPI, MPICH, SRUN)
"""Innermost first: torchrun runs inside mpirun or srun, and mpirun starts its daemons with srun."""

TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def world_from_environment(environment: Mapping[str, str]) -> World:
    """Return the rank that a launcher set, or a single process without its variables.

    The innermost launcher counts if the outer ones are explained: one torchrun in each of their tasks, daemons of mpirun started by srun,
    a single task, or equal numbers. Raises ConfigError naming variables that are missing, not integers or contradictory.
    """
    started = [launcher for launcher in LAUNCHERS if any(name in environment for name in launcher.present)]
    if SRUN in started and MPICH in started and not any(name in environment for name in MPICH.variables[2:]):
        started.remove(MPICH)  # srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE, too
        _check_pmi(environment)
    if not started:
        return World()
    inner, *outer = [(launcher, _read(launcher, environment)) for launcher in started]
    for launcher, world in outer:
        if not _is_explained(inner[1], world, environment):
            raise ConfigError(
                f"environment: {inner[0].name} and {launcher.name} name different ranks for one process",
                found=f"{inner[0].found(environment)} ({inner[0].name}); {launcher.found(environment)} ({launcher.name})",
                fix=f"one launcher alone, or unset {' '.join(inner[0].variables)}",
            )
    world = inner[1]
    # One task: the shell of `srun --pty`, or one task that owns all GPUs of its node.
    return World() if world.launcher == SRUN.name and world.world_size == 1 else world


def _check_pmi(environment: Mapping[str, str]) -> None:
    pairs = (("PMI_RANK", "SLURM_PROCID"), ("PMI_SIZE", "SLURM_STEP_NUM_TASKS"))
    wrong = [f"{name}={environment[name]}" for pair in pairs if len({environment.get(name) for name in pair} - {None}) > 1
             for name in pair]  # fmt: skip
    if wrong:
        raise ConfigError(
            "environment: srun and its PMI name different ranks for one process", found=", ".join(wrong), fix="unset PMI_RANK PMI_SIZE"
        )  # fmt: skip


def _is_explained(inner: World, outer: World, environment: Mapping[str, str]) -> bool:
    if outer.world_size == 1 or (inner.rank, inner.world_size) == (outer.rank, outer.world_size):
        return True
    if inner.launcher == TORCHRUN.name:  # one torchrun in every task; it sets the number of its agents
        return environment.get("GROUP_WORLD_SIZE") == str(outer.world_size)
    # mpirun starts one daemon a machine with srun.
    return outer.launcher == SRUN.name and outer.local_world_size == 1


def _read(launcher: Launcher, environment: Mapping[str, str]) -> World:
    """Return the world of one launcher. Raises ConfigError."""
    found = launcher.found(environment)
    missing = [name for name in launcher.variables if name not in environment]
    if missing:
        raise ConfigError(
            f"environment: {found} without {', '.join(missing)}",
            fix=f"start the ranks with {_command(launcher)}, or unset {' '.join(name for name in launcher.variables if name not in missing)}",
        )
    values = {name: environment[name] for name in launcher.variables}
    if launcher is SRUN:
        values[launcher.local_world_size] = tasks_of_node(
            values[launcher.local_world_size], environment.get("SLURM_NODEID", "0")
        )
    wrong = list(_not_numbers(values))
    if wrong:
        raise ConfigError(f"environment: {', '.join(wrong)}: not a whole number")
    rank, world_size, local_rank, local_world_size = (int(values[name]) for name in launcher.variables)
    if not (rank < world_size and local_rank < local_world_size <= world_size and local_rank <= rank):
        first, size, local, local_size = launcher.variables
        raise ConfigError(
            f"environment: contradictory rank variables; required: {first} < {size}, {local} < {local_size} <= {size} and"
            f" {local} <= {first}",
            found=found,
        )
    return World(
        rank, local_rank, world_size, local_world_size, launcher.name, launcher is SRUN and _gpus_per_task(environment)
    )


def _gpus_per_task(environment: Mapping[str, str]) -> bool:
    """Return whether SLURM gave each task GPUs of its own; since 23.02 it says so in SLURM_TRES_PER_TASK."""
    bind = environment.get("SLURM_GPU_BIND", "").removeprefix("verbose,")
    if bind.startswith("none"):
        return False
    asked = "SLURM_GPUS_PER_TASK" in environment or "gpu" in environment.get("SLURM_TRES_PER_TASK", "")
    return asked or bind.startswith(("per_task", "single"))


def _not_numbers(values: Mapping[str, str]) -> Iterator[str]:
    for name, value in values.items():
        if not (value.strip().isascii() and value.strip().isdecimal()):
            yield f"{name}={value!r}"


def _command(launcher: Launcher) -> str:
    return "mpirun" if launcher in (OPENMPI, MPICH) else launcher.name


def tasks_of_node(text: str, node: str) -> str:
    """Return the number of tasks of a node in SLURM's list: `2(x3),1` are three nodes with two tasks and one with one."""
    counts: list[str] = []
    for part in text.split(","):
        found = TASKS.fullmatch(part.strip())
        if found is None or len(counts) > 100_000:
            return text
        counts.extend(_repeated(found[1], found[2]))
    index = int(node) if node.isascii() and node.isdecimal() else len(counts)
    return counts[index] if index < len(counts) else text


def _repeated(count: str, times: str | None) -> Iterable[str]:
    return [count] * min(int(times or 1), 100_000)


def is_quiet(environment: Mapping[str, str]) -> bool:
    """Return whether this process is a rank above 0, whose notes and warnings repeat those of rank 0."""
    try:
        return world_from_environment(environment).rank > 0
    except ConfigError:
        return shares_errors(environment)


def shares_errors(environment: Mapping[str, str]) -> bool:
    """Return whether a lower rank on this machine finds the same errors before ranks meet: same files, variables and command line."""
    try:
        return world_from_environment(environment).local_rank > 0
    except ConfigError:
        return any(environment.get(launcher.local_rank, "0").strip() not in ("", "0") for launcher in LAUNCHERS[:3])
