"""GPUs, CPU, memory, driver and packages of a machine, probed or read from a machine file (JSON of `Machine`)."""

from __future__ import annotations

import os
import sys
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from json import dumps
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import ConfigDict, NonNegativeInt, TypeAdapter, ValidationError

from gptoughts.errors import ConfigError, describe, nearest
from gptoughts.hardware.cpu import ROOT, Cpu, read_cpu, read_free_bytes, read_memory_bytes
from gptoughts.hardware.nvml import Gpu, read_gpus
from gptoughts.hardware.packages import installed_packages

__all__ = ["Cpu", "Gpu", "Machine", "World", "probe", "read", "world_from_environment"]

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""Of machine files; nested records inherit it."""

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Machine:
    """Hardware and packages as a process sees them. `packages` is name -> version; `notes` list failed reads.

    `memory_bytes` is the lower of RAM and the cgroup limit; `cuda` is the highest CUDA version that the driver supports.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    gpus: tuple[Gpu, ...]
    cpu: Cpu
    memory_bytes: NonNegativeInt | None
    system: str
    python: str
    driver: str | None = None
    cuda: str | None = None
    packages: dict[str, str] = field(default_factory=dict, hash=False)
    notes: tuple[str, ...] = ()
    free_bytes: NonNegativeInt | None = field(default=None, compare=False)
    """Free memory at the time of the probe."""

    def label(self) -> str:
        """Return `8 x NVIDIA H100 80GB HBM3 (sm 9.0)`, different GPUs joined by ` + `, or `CPU: 2 cores, ...`."""
        counts: dict[str, int] = {}
        for gpu in self.gpus:
            part = f"{gpu.name} ({gpu.capability_label})"
            counts[part] = counts.get(part, 0) + 1
        return " + ".join(f"{count} x {part}" for part, count in counts.items()) or f"CPU: {self.cpu.label()}"

    def min_capability(self) -> tuple[int, int] | None:
        """Return the lowest compute capability of the GPUs; None without a GPU or if one is unknown."""
        known = [gpu.compute_capability for gpu in self.gpus if gpu.compute_capability is not None]
        return min(known) if known and len(known) == len(self.gpus) else None

    def has_older(self, package: str, than: tuple[int, int]) -> bool:
        """Return whether `package` is older than (major, minor) `than`; False if it is missing or has no such version."""
        parts = self.packages.get(package, "").split(".")[:2]
        return len(parts) == 2 and all(part.isdigit() for part in parts) and (int(parts[0]), int(parts[1])) < than

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists, strings and numbers. Free memory is left out: it is a momentary value."""
        plain = typing.cast("dict[str, Any]", _plain(asdict(self)))
        for part in (plain, *plain["gpus"]):
            del part["free_bytes"]
        return plain

    @staticmethod
    def from_json(value: object, source: str = "machine") -> Machine:
        """Return the machine of a JSON value. Raises ConfigError listing every unknown key and wrong value with its path."""
        return _validate(Machine, dumps(value), source)


@dataclass(frozen=True)
class World:
    """Rank and world size of this process; `launcher` is `single` or `torchrun`."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    rank: NonNegativeInt = 0
    local_rank: NonNegativeInt = 0
    world_size: NonNegativeInt = 1
    local_world_size: NonNegativeInt = 1
    launcher: str = "single"

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers and strings."""
        return asdict(self)

    @staticmethod
    def from_json(value: object, source: str = "world") -> World:
        """Return the world of a JSON value. Raises ConfigError as `Machine.from_json`."""
        return _validate(World, dumps(value), source)


def probe(environment: Mapping[str, str] | None = None, system: str = sys.platform, root: Path = ROOT) -> Machine:
    """Return this machine with CUDA_VISIBLE_DEVICES of `environment` (default: os.environ) applied. Never raises.

    `system` is a value of `sys.platform`, `root` the root of the file system; tests replace both.
    """
    environment = os.environ if environment is None else environment
    notes: list[str] = []
    memory_bytes = read_memory_bytes(system, root)
    if memory_bytes is None:
        notes.append("memory: not read (no /proc/meminfo or sysctl value)")
    packages, package_notes = installed_packages()
    reading = read_gpus(environment, root) if system != "darwin" else None
    if reading is None:
        notes.append("no NVIDIA GPU: no driver for macOS")
    return Machine(
        gpus=reading.gpus if reading else (),
        cpu=read_cpu(system, root),
        memory_bytes=memory_bytes,
        system=system,
        python="{}.{}.{}".format(*sys.version_info[:3]),
        driver=reading.driver if reading else None,
        cuda=reading.cuda if reading else None,
        packages=packages,
        notes=(*(reading.notes if reading else ()), *notes, *package_notes),
        free_bytes=read_free_bytes(root) if system == "linux" else None,
    )


def read(path: str | Path) -> Machine:
    """Return the machine of a file. Raises ConfigError if the file is missing, not JSON or invalid."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"machine file {path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"machine file {path}: cannot read it ({error.strerror})") from None
    return _validate(Machine, content, f"machine file {path}")


def world_from_environment(environment: Mapping[str, str]) -> World:
    """Return the rank that torchrun set, or a single process without its variables.

    Raises ConfigError naming variables that are missing, not integers or contradictory.
    """
    present = {name: environment[name] for name in RANK_VARIABLES if name in environment}
    if not present:
        return World()
    found = ", ".join(f"{name}={value}" for name, value in present.items())
    missing = [name for name in RANK_VARIABLES if name not in present]
    if missing:
        raise ConfigError(
            f"environment: {found} without {', '.join(missing)}",
            fix=f"start the ranks with torchrun, or unset {', '.join(present)}",
        )
    wrong = [f"{name}={value!r}" for name, value in present.items() if not value.strip().isdecimal()]
    if wrong:
        raise ConfigError(f"environment: {', '.join(wrong)}: not a whole number")
    rank, world_size, local_rank, local_world_size = (int(present[name]) for name in RANK_VARIABLES)
    if not (rank < world_size and local_rank < local_world_size <= world_size and local_rank <= rank):
        raise ConfigError(
            "environment: contradictory rank variables; required: RANK < WORLD_SIZE, LOCAL_RANK < LOCAL_WORLD_SIZE"
            " <= WORLD_SIZE and LOCAL_RANK <= RANK",
            found=found,
        )
    return World(rank, local_rank, world_size, local_world_size, "torchrun")


def _plain(value: Any) -> Any:
    """Replace tuples and dict subclasses by lists and dicts at every level."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


Record = TypeVar("Record", Machine, World)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _validate(kind: type[Record], content: str | bytes, source: str) -> Record:
    """Return `content`, JSON, as `kind`. Raises ConfigError listing every problem with its key path."""
    try:
        # Only JSON input lets strict mode take lists for tuples and objects for records.
        return typing.cast("Record", _adapter(typing.cast("Any", kind)).validate_json(content))
    except ValidationError as error:
        problems = error.errors(include_url=False)
    if problems[0]["type"] == "json_invalid":
        raise ConfigError(f"{source}: not valid JSON ({problems[0]['ctx']['error']})")
    raise ConfigError(f"{source}:\n" + "\n".join(f"  {_problem(kind, problem)}" for problem in problems))


def _problem(kind: type, problem: Mapping[str, Any]) -> str:
    """Return one pydantic error as `gpus[0].mig: input should be a valid boolean. Found 0`."""
    place = problem["loc"]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".") or "top level"
    if problem["type"] == "missing":
        return f"{path}: missing"
    if problem["type"] == "unexpected_keyword_argument":
        record = {"gpus": Gpu, "cpu": Cpu}.get(place[0], kind) if len(place) > 1 else kind
        return f"{path}: unknown key{nearest(str(place[-1]), [part.name for part in fields(record)])}"
    text = problem["msg"]
    return describe(f"{path}: {text[:1].lower()}{text[1:]}", found=f"{problem['input']!r:.60}")
