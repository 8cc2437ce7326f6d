"""What is here: GPUs, CPU, memory, driver and packages; live, or from a machine file that stands for another box.

A machine file is the JSON of `Machine`, so that a plan can be made for hardware that is not here.
"""

from __future__ import annotations

import os
import shutil
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from json import JSONDecodeError, loads
from pathlib import Path
from typing import Any

from gptoughts.errors import ConfigError, nearest
from gptoughts.hardware.cpu import ROOT, Cpu, read_cpu, read_free_bytes, read_memory_bytes
from gptoughts.hardware.nvml import Gpu, read_gpus

__all__ = ["Cpu", "Gpu", "Machine", "World", "probe", "read", "world_from_environment"]

# Distributions that decide a layer, a tracker or a file format, with normalized names.
DISTRIBUTIONS = (
    "torch", "triton", "numpy", "safetensors", "tokenizers", "tiktoken", "zstandard", "rich", "matplotlib",
    "transformers", "datasets", "pyarrow", "jinja2", "accelerate", "peft", "pytorch-optimizer", "schedulefree",
    "transformer-engine", "transformer-engine-torch",
    "flash-attn", "flash-attn-3", "flash-attn-4", "tokenspeed-fa3", "torchao", "liger-kernel", "bitsandbytes",
    "deepspeed", "xformers", "wandb", "tensorboard", "mpi4py", "nvidia-ml-py",
)  # fmt: skip

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Machine:
    """One box as a process sees it. `packages` is name -> version; `notes` say what could not be read and why.

    `memory_bytes` is RAM or the cgroup's limit, whichever is lower; `cuda` is the version that the driver carries.
    """

    gpus: tuple[Gpu, ...]
    cpu: Cpu
    memory_bytes: int | None
    system: str
    python: str
    driver: str | None = None
    cuda: str | None = None
    packages: dict[str, str] = field(default_factory=dict, hash=False)
    notes: tuple[str, ...] = ()
    free_bytes: int | None = field(default=None, compare=False)
    """Of its memory, when it was looked at."""

    def label(self) -> str:
        """`8 x NVIDIA H100 80GB HBM3 (sm 9.0)`, a mixed box joined by ` + `, or `CPU: 2 cores, ...`."""
        counts: dict[str, int] = {}
        for gpu in self.gpus:
            part = f"{gpu.name} ({gpu.capability_label})"
            counts[part] = counts.get(part, 0) + 1
        return " + ".join(f"{count} x {part}" for part, count in counts.items()) or f"CPU: {self.cpu.label()}"

    def min_capability(self) -> tuple[int, int] | None:
        """Compute capability of the least capable GPU; None without a GPU, or where one of them is unknown."""
        known = [gpu.compute_capability for gpu in self.gpus if gpu.compute_capability is not None]
        return min(known) if known and len(known) == len(self.gpus) else None

    def has_older(self, package: str, than: tuple[int, int]) -> bool:
        """Whether `package` is here in a version before `than`; False where it is not here, or its version has no two numbers."""
        parts = self.packages.get(package, "").split(".")[:2]
        return len(parts) == 2 and all(part.isdigit() for part in parts) and (int(parts[0]), int(parts[1])) < than

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; without what was free, which is true for a moment."""
        plain = typing.cast("dict[str, Any]", _plain(asdict(self)))
        for part in (plain, *plain["gpus"]):
            del part["free_bytes"]
        return plain

    @staticmethod
    def from_json(value: object, source: str = "machine") -> Machine:
        """The inverse of `to_json`. ConfigError lists every unknown key and wrong type with its place in `source`."""
        return typing.cast("Machine", _decode_all(Machine, value, source))


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run; `launcher` is `single` or `torchrun`."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launcher: str = "single"

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return asdict(self)

    @staticmethod
    def from_json(value: object, source: str = "world") -> World:
        """The inverse of `to_json`; ConfigError as for Machine."""
        return typing.cast("World", _decode_all(World, value, source))


def probe(environment: Mapping[str, str] | None = None, system: str = sys.platform, root: Path = ROOT) -> Machine:
    """This machine, with CUDA_VISIBLE_DEVICES of `environment` (default: the process's) applied. Never raises.

    `system` and `root` are for another platform's words and a file system that lies elsewhere.
    """
    environment = os.environ if environment is None else environment
    notes: list[str] = []
    memory_bytes = read_memory_bytes(system, root)
    if memory_bytes is None:
        notes.append("memory: not read (no /proc/meminfo, no sysctl)")
    packages, said = installed_packages()
    reading = read_gpus(environment, root) if system != "darwin" else None
    if reading is None:
        notes.append("no NVIDIA GPU: there is no driver for macOS")
    return Machine(
        gpus=reading.gpus if reading else (),
        cpu=read_cpu(system, root),
        memory_bytes=memory_bytes,
        system=system,
        python="{}.{}.{}".format(*sys.version_info[:3]),
        driver=reading.driver if reading else None,
        cuda=reading.cuda if reading else None,
        packages=packages,
        notes=(*(reading.notes if reading else ()), *notes, *said),
        free_bytes=read_free_bytes(root) if system == "linux" else None,
    )


def read(path: str | Path) -> Machine:
    """The machine that a file describes. ConfigError where it is missing, no JSON, or does not fit."""
    try:
        value = loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"machine file {path}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"machine file {path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"machine file {path}: is no JSON ({error})") from None
    return Machine.from_json(value, f"machine file {path}")


def installed_packages() -> tuple[dict[str, str], list[str]]:
    """Versions of the distributions of interest by their metadata, importing none, and notes on those that are broken.

    `c++` is the compiler that torch.compile finds on a CPU, by its command instead of a version.

    torch is given as `torch.__version__` would say, with its build (`+cpu`, `+cu130`) that its metadata may leave out.
    """
    from importlib import metadata

    found: dict[str, str] = {}
    notes: list[str] = []
    compiler = next((name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), None)
    if compiler is not None:
        found["c++"] = compiler
    for name in DISTRIBUTIONS:
        try:
            distribution = metadata.distribution(name)
            version: str | None = distribution.version
        except metadata.PackageNotFoundError:
            continue
        except Exception as error:  # metadata is a file that anything may have cut short
            notes.append(f"package {name}: its metadata cannot be read ({type(error).__name__}: {error})")
            continue
        if not version:
            notes.append(f"package {name}: its metadata names no version")
            continue
        found[name] = (
            _torch_version(Path(str(distribution.locate_file("torch/version.py")))) or version if name == "torch" else version
        )
    return found, notes


def _torch_version(path: Path) -> str | None:
    """`__version__` as torch/version.py spells it, read as text."""
    import re

    try:
        match = re.search(r"^__version__ = '([^']+)'", path.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return None
    return match[1] if match else None


def world_from_environment(environment: Mapping[str, str]) -> World:
    """The rank that torchrun gave this process, or one process where it set nothing.

    ConfigError names the variables where some are missing, are no integers, or contradict each other.
    """
    present = {name: environment[name] for name in RANK_VARIABLES if name in environment}
    if not present:
        return World()
    told = ", ".join(f"{name}={value}" for name, value in present.items())
    missing = [name for name in RANK_VARIABLES if name not in present]
    if missing:
        raise ConfigError(
            f"environment: {told} without {', '.join(missing)}; start the ranks with torchrun, or unset {', '.join(present)}"
        )
    odd = [name for name, value in present.items() if not value.strip().isdecimal()]
    if odd:
        raise ConfigError(f"environment: {', '.join(f'{name}={present[name]!r}' for name in odd)}: not a whole number")
    rank, world_size, local_rank, local_world_size = (int(present[name]) for name in RANK_VARIABLES)
    if not (rank < world_size and local_rank < local_world_size <= world_size and local_rank <= rank):
        raise ConfigError(
            f"environment: {told} contradict each other; needed are RANK < WORLD_SIZE, LOCAL_RANK < LOCAL_WORLD_SIZE"
            " <= WORLD_SIZE and LOCAL_RANK <= RANK"
        )
    return World(rank, local_rank, world_size, local_world_size, "torchrun")


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _decode_all(kind: type, value: object, source: str) -> Any:
    problems: list[str] = []
    decoded = _decode(kind, value, "", problems)
    if problems:
        raise ConfigError(f"{source}:\n" + "\n".join(f"  {line}" for line in problems))
    return decoded


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _decode(kind: Any, value: object, place: str, problems: list[str]) -> Any:
    """`value` as `kind`, which is one of the types that the records above use; what does not fit goes to `problems`."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        return _decode_record(typing.cast("type", kind), value, place, problems)
    if origin is types.UnionType:
        return None if value is None else _decode(inner[0], value, place, problems)
    if origin is tuple and isinstance(value, list):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(value):
            return tuple(_decode(kinds[i], one, f"{place}[{i}]", problems) for i, one in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _decode(inner[1], one, f"{place}.{key}", problems) for key, one in value.items()}
    # True is an int to Python, and 450 is a fair way to write 450.0. No number in these records can be negative.
    if kind is float and type(value) in (int, float) and 0 <= typing.cast("float", value) <= 1e300:
        return float(typing.cast("float", value))
    if kind is int and type(value) is int and value >= 0:
        return value
    if kind in (str, bool) and type(value) is kind:
        return value
    problems.append(f"{place or 'top'}: expected {_words(kind)}, found {value!r:.60}")
    return None


def _decode_record(kind: type, value: object, place: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{place or 'top'}: expected an object, found {value!r:.60}")
        return None
    hints, before, prefix = _hints(kind), len(problems), f"{place}." if place else ""
    problems += [f"{prefix}{key}: unknown key{nearest(str(key), hints)}" for key in value if key not in hints]
    given = {name: _decode(hints[name], value[name], f"{prefix}{name}", problems) for name in hints if name in value}
    for part in fields(kind):
        if part.name not in value and part.default is part.default_factory:  # both MISSING: no default
            problems.append(f"{prefix}{part.name}: missing")
    return kind(**given) if len(problems) == before else None


def _words(kind: Any) -> str:
    known = {
        int: "a whole number of at least 0",
        float: "a number of at least 0",
        str: "a string",
        bool: "true or false",
    }
    if kind in known:
        return known[kind]
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is dict:
        return "an object"
    return "a list" if inner[-1] is Ellipsis else f"a list of {len(inner)}"
