"""GPUs, CPU, memory, driver and packages of a machine, probed or read from a machine file (JSON of `Machine`)."""

from __future__ import annotations

import os
import sys
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from json import dumps
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, NonNegativeInt

from gptoughts.errors import ConfigError
from gptoughts.files import read_limited
from gptoughts.hardware.cpu import ROOT, Cpu, read_cpu, read_free_bytes, read_memory_bytes
from gptoughts.hardware.nvml import Gpu, read_gpus
from gptoughts.hardware.packages import installed_packages
from gptoughts.hardware.records import STRICT, validate

__all__ = ["Cpu", "Gpu", "Machine", "probe", "read"]


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
        return validate(Machine, dumps(value), source)


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
        content = read_limited(Path(path))
    except FileNotFoundError:
        raise ConfigError(f"machine file {path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"machine file {path}: cannot read it ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"machine file {path}: cannot read it ({error})") from None
    return validate(Machine, content, f"machine file {path}")


def _plain(value: Any) -> Any:
    """Replace tuples and dict subclasses by lists and dicts at every level."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
