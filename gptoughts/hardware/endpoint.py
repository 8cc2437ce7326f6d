"""Address at which ranks meet, from the variables of a launcher. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gptoughts.errors import ConfigError
from gptoughts.hardware.world import TORCHRUN, World

RENDEZVOUS_SECONDS = "GPTOUGHTS_RENDEZVOUS_SECONDS"
"""Environment variable: limit in seconds for all ranks to meet; 300 by default."""
COLLECTIVE_SECONDS = "GPTOUGHTS_COLLECTIVE_SECONDS"
"""Environment variable: limit in seconds for one collective operation; 3600 by default: the failure watch ends a stalled run long before."""
MEETING_FILE = "GPTOUGHTS_MEETING_FILE"
"""Environment variable: file where ranks that `gptoughts train` started meet; its folder is private, so no port has to be open."""
DEFAULT_PORT = 29500
LOOPBACK = "127.0.0.1"
PORTS = range(15_000, 31_000)
"""Ports derived from a job id: above the well-known ones, below the ports that Linux gives to clients."""
MOST_HOSTS = 100_000
_PART = re.compile(r"([^\[\],\s]*)\[([^\[\]]*)\]|([^\[\],\s]+)")


@dataclass(frozen=True)
class Endpoint:
    """Where ranks meet: a TCP address, or a file for ranks of one machine. `source` names the variables that said so."""

    address: str
    port: int
    source: str
    serves: bool = False
    """Whether this process listens; the others connect."""
    file: Path | None = None

    def __str__(self) -> str:
        return str(self.file) if self.file else f"{self.address}:{self.port}"


def endpoint(world: World, environment: Mapping[str, str]) -> Endpoint:
    """Return where this world meets. MASTER_ADDR and MASTER_PORT count first. Raises ConfigError if the address is unknown or invalid."""
    port = _number("MASTER_PORT", environment, 65_535)
    # torchrun's agent listens; otherwise rank 0 does.
    serves = world.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if environment.get(MEETING_FILE) and world.launcher == TORCHRUN.name and world.on_one_machine:
        return Endpoint(LOOPBACK, 0, "ranks of gptoughts train", serves, Path(environment[MEETING_FILE]))
    if environment.get("MASTER_ADDR"):
        job = _job_port(environment) if world.launcher == "srun" else None
        chosen = port or job or DEFAULT_PORT
        source = f"MASTER_ADDR={environment['MASTER_ADDR']}" + (
            f", MASTER_PORT={port}" if port else f", port {chosen} by default"
        )
        return Endpoint(environment["MASTER_ADDR"], chosen, source, serves)
    if world.launcher == "srun":
        return _of_step(world, environment, port, serves)
    if world.launcher in ("openmpi", "mpich") and world.on_one_machine:
        if port:
            return Endpoint(LOOPBACK, port, f"MASTER_PORT={port}, all ranks on this machine", serves)
        return Endpoint(
            LOOPBACK, 0, f"all ranks on this machine, started by {world.launcher}", serves, _shared_file(environment)
        )
    if world.launcher in ("openmpi", "mpich"):
        how = "-x MASTER_ADDR=HOST" if world.launcher == "openmpi" else "-genv MASTER_ADDR HOST"
        raise ConfigError(
            "MASTER_ADDR: not set, and mpirun started ranks on several machines",
            found=f"{world.local_world_size} of {world.world_size} ranks on this machine",
            fix=f"mpirun {how} ..., with the machine of rank 0",
        )
    raise ConfigError(
        "MASTER_ADDR: not set", found=f"{world.world_size} ranks", fix="torchrun, which sets it, or export MASTER_ADDR=HOST"
    )


def limit(variable: str, environment: Mapping[str, str], default: int) -> int:
    """Return a limit in seconds from a variable. Raises ConfigError."""
    return _number(variable, environment, 10**7) or default


def first_host(nodes: str) -> str:
    """Return the first host of a compressed list. Raises ConfigError."""
    return hosts(nodes)[0]


def hosts(nodes: str) -> list[str]:
    """Return the hosts of SLURM's compressed list: `n[1-3,07],m2` are n1, n2, n3, n07 and m2. Raises ConfigError."""
    found: list[str] = []
    position, text = 0, nodes.strip()
    while True:
        part, names = _PART.match(text, position), [""]
        while part:  # the pieces of one entry, such as rack[1-2]node[1-4]
            choices = [part[1] + number for number in _numbers(part[2], nodes)] if part[3] is None else [part[3]]
            if len(names) * len(choices) + len(found) > MOST_HOSTS:
                raise ConfigError(f"SLURM_STEP_NODELIST: more than {MOST_HOSTS} hosts", found=nodes[:200])
            names = [name + choice for name in names for choice in choices]
            position = part.end()
            part = _PART.match(text, position)
        if names == [""]:
            break
        found += names
        if position == len(text):
            return found
        if text[position] != ",":
            break
        position += 1
    raise ConfigError("SLURM_STEP_NODELIST: not a list of hosts", found=repr(nodes[:200]), fix="export MASTER_ADDR=HOST")


def _numbers(text: str, nodes: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        low, dash, high = part.partition("-")
        ends = (low, high if dash else low)
        if (
            not all(end.isascii() and end.isdecimal() and len(end) < 19 for end in ends)
            or not 0 <= int(ends[1]) - int(ends[0]) < MOST_HOSTS
        ):
            raise ConfigError(
                "SLURM_STEP_NODELIST: not a list of hosts", found=repr(nodes[:200]), fix="export MASTER_ADDR=HOST"
            )
        numbers += [f"{number:0{len(low)}d}" for number in range(int(ends[0]), int(ends[1]) + 1)]
    return numbers


def _of_step(world: World, environment: Mapping[str, str], port: int | None, serves: bool) -> Endpoint:
    chosen = port or _job_port(environment)
    if world.on_one_machine:
        return Endpoint(LOOPBACK, chosen, f"SLURM_JOB_ID={environment.get('SLURM_JOB_ID')}, one node", serves)
    name = "SLURM_STEP_NODELIST" if environment.get("SLURM_STEP_NODELIST") else "SLURM_JOB_NODELIST"
    nodes = environment.get(name, "")
    if not nodes:
        raise ConfigError(
            "SLURM_STEP_NODELIST: not set by srun, MASTER_ADDR neither", fix="export MASTER_ADDR=HOST before srun"
        )
    source = f"{name}={nodes}, SLURM_JOB_ID={environment.get('SLURM_JOB_ID')}"
    return Endpoint(first_host(nodes), chosen, source, serves)


def _job_port(environment: Mapping[str, str]) -> int:
    """Return a port that all tasks of a job step derive; steps that run at once get others."""
    job, step = (environment.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    mixed = sum(int(text) * factor for text, factor in ((job, 1), (step, 97)) if text.isascii() and text.isdecimal())
    return PORTS[mixed % len(PORTS)]


def _number(name: str, environment: Mapping[str, str], most: int) -> int | None:
    text = environment.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= most):
        raise ConfigError(f"{name}: must be a whole number from 1 to {most}", found=repr(text))
    return int(text)


def _shared_file(environment: Mapping[str, str]) -> Path:
    """Return a path that all ranks of one mpirun on this machine derive, and no other job."""
    parts = [environment[name] for name in ("PMIX_NAMESPACE", "PMIX_SERVER_URI2") if name in environment]
    if len(parts) < 2:  # Hydra: all ranks of a machine have one parent
        parts = [str(os.getppid()), _start_time(os.getppid())]
    key = hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]
    # In a private folder: the name can be guessed, and another user could have made the file.
    return private_folder(Path(tempfile.gettempdir()) / f"gptoughts-{os.getuid()}") / f"{key}.rendezvous"


def _start_time(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def private_folder(path: Path) -> Path:
    """Make a folder that only this user can enter, or check one that exists. Raises ConfigError for a link or another user's."""
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"{path}: must be a folder of this user alone",
            found=f"mode {stat.S_IMODE(found.st_mode):o}, user {found.st_uid}",
            fix=f"rm -r {path}, or set TMPDIR to a folder of yours",
        )
    return path
