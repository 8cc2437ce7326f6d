"""CPU and memory available to this process: affinity, cgroup limits, instruction sets and NUMA nodes.

Every reader takes the root of the file system, so that tests can use a tree of plain files. A missing or malformed file
gives None or an empty tuple, never an error.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from pydantic import NonNegativeInt

ROOT = Path("/")

# Instruction sets that decide a layer or a thread count, in the kernel's spelling: x86 in `flags`, ARM in `Features`.
INSTRUCTION_SETS = (
    "avx2", "f16c", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni",
    "amx_tile", "amx_bf16", "amx_int8", "amx_fp16", "amx_tf32", "asimd", "asimdhp", "sve", "sve2", "i8mm", "bf16",
    "svebf16", "sme",
)  # fmt: skip
_LOW_PRECISION = ("avx512_bf16", "amx_bf16", "amx_fp16", "bf16")
_WIDEST = ("avx512f", "avx2", "sve", "asimd")

# macOS has one sysctl key per feature; the value is the Linux name.
_SYSCTL_SETS = {
    "hw.optional.avx2_0": "avx2", "hw.optional.f16c": "f16c", "hw.optional.fma": "fma",
    "hw.optional.avx512f": "avx512f", "hw.optional.avx512bw": "avx512bw", "hw.optional.avx512vl": "avx512vl",
    "hw.optional.AdvSIMD": "asimd", "hw.optional.arm.FEAT_FP16": "asimdhp", "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16", "hw.optional.arm.FEAT_SME": "sme",
}  # fmt: skip

# /proc/cpuinfo on ARM has only numbers: implementer 0x41 (Arm), part numbers from Arm's MIDR_EL1 tables.
_ARM_PARTS = {"0xd0c": "Neoverse-N1", "0xd40": "Neoverse-V1", "0xd49": "Neoverse-N2", "0xd4f": "Neoverse-V2"}


@dataclass(frozen=True)
class Cpu:
    """CPU as available to this process.

    `usable_cores` is the size of the affinity mask, limited by the cgroup quota (rounded down, at least 1), in logical cores.
    `numa_cores[n]` are the logical cores of NUMA node n in the affinity mask; empty for a memory-only node.
    `numa_nodes` is the number of nodes with cores.
    """

    model: str
    usable_cores: NonNegativeInt
    logical_cores: NonNegativeInt
    instruction_sets: tuple[str, ...] = ()
    numa_nodes: NonNegativeInt = 1
    numa_cores: tuple[tuple[NonNegativeInt, ...], ...] = ()

    def label(self) -> str:
        """Return `2 cores, Intel(R) Xeon(R) Processor, amx_bf16`: cores, model, and the low-precision or else widest vector set."""
        shown = [word for word in _LOW_PRECISION if word in self.instruction_sets]
        shown = shown or [word for word in _WIDEST if word in self.instruction_sets][:1]
        cores = "1 core" if self.usable_cores == 1 else f"{self.usable_cores} cores"
        return ", ".join([cores, self.model, *shown])


def read_cpu(system: str = sys.platform, root: Path = ROOT) -> Cpu:
    """Return the CPU of this process; `system` is a value of `sys.platform`."""
    logical = os.cpu_count() or 1
    allowed = _affinity(logical)
    if system != "linux":
        model = _sysctl("machdep.cpu.brand_string") or _machine_word()
        sets = tuple(word for key, word in _SYSCTL_SETS.items() if _sysctl(key) == "1") if system == "darwin" else ()
        return Cpu(model, len(allowed), logical, _ordered(sets), 1, (tuple(allowed),))
    quota = cgroup_cpu_quota(root)
    usable = len(allowed) if quota is None else max(1, min(len(allowed), int(quota)))
    model, sets = read_cpuinfo(root)
    nodes = read_numa(root) or (tuple(range(logical)),)
    cut = tuple(tuple(core for core in node if core in allowed) for node in nodes)
    return Cpu(model, usable, logical, sets, sum(bool(node) for node in nodes), cut)


def read_memory_bytes(system: str = sys.platform, root: Path = ROOT) -> int | None:
    """Return the memory limit of this process in bytes: the lower of RAM and the cgroup limit; None if unknown."""
    if system == "darwin":
        text = _sysctl("hw.memsize") or ""
        return int(text) if text.isdigit() else None
    match = re.search(r"^MemTotal:\s+(\d+) kB", _text(root / "proc/meminfo") or "", re.MULTILINE)
    limits = [int(match[1]) * 1024] if match else []
    limit = cgroup_memory_limit(root)
    if limit is not None:
        limits.append(limit)
    return min(limits, default=None)


def read_free_bytes(root: Path = ROOT) -> int | None:
    """Return the memory in bytes available without swapping, at most the cgroup limit; None if unknown."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo") or "", re.MULTILINE)
    if match is None:
        return None
    limit = cgroup_memory_limit(root)
    return min(int(match[1]) * 1024, limit) if limit is not None else int(match[1]) * 1024


def read_cpuinfo(root: Path = ROOT) -> tuple[str, tuple[str, ...]]:
    """Return model name and relevant instruction sets of the first core in /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().casefold(), value.strip())
    present = set(f"{fields.get('flags', '')} {fields.get('features', '')}".split())
    model = fields.get("model name")
    if not model and fields.get("cpu implementer") == "0x41":
        model = _ARM_PARTS.get(fields.get("cpu part", ""))
    return model or _machine_word(), _ordered(present)


def read_numa(root: Path = ROOT) -> tuple[tuple[int, ...], ...]:
    """Return the logical cores of each NUMA node, indexed by node number; empty if unknown."""
    nodes: dict[int, tuple[int, ...]] = {}
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        cores = parse_cores(_text(folder / "cpulist") or "")
        if cores and folder.name[4:].isdigit():
            nodes[int(folder.name[4:])] = cores
    return tuple(nodes.get(number, ()) for number in range(max(nodes, default=-1) + 1))


def parse_cores(text: str) -> tuple[int, ...]:
    """Parse a core list: `0-3,8` -> (0, 1, 2, 3, 8). Empty if malformed."""
    cores: list[int] = []
    for part in text.strip().split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match:
            return ()
        cores += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(cores)


def cgroup_cpu_quota(root: Path = ROOT) -> float | None:
    """Return the CPU quota in cores: the lowest of the cgroup and its parents; None without a limit."""
    quotas = []
    for folder in _cgroup_folders("cpu", root):
        words = (_text(folder / "cpu.max") or "").split()
        if not words:
            words = [(_text(folder / f"cpu.cfs_{key}_us") or "").strip() for key in ("quota", "period")]
        # No limit is "max" in cgroup v2 and -1 in v1; neither consists of digits.
        if len(words) == 2 and all(word.isdigit() and int(word) > 0 for word in words):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def cgroup_memory_limit(root: Path = ROOT) -> int | None:
    """Return the memory limit in bytes: the lowest of the cgroup and its parents; None without a limit."""
    limits = []
    for folder in _cgroup_folders("memory", root):
        text = (_text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes") or "").strip()
        # cgroup v1 represents no limit by the largest multiple of the page size below 2^63.
        if text.isdigit() and int(text) < 1 << 60:
            limits.append(int(text))
    return min(limits, default=None)


def _cgroup_folders(controller: str, root: Path) -> list[Path]:
    """Return the folders that can hold limits of this controller: the cgroup and its parents, cgroup v1 and v2.

    In a container, /proc/self/cgroup may show the host's path, which does not exist below the mount. The mount root is then
    the container's cgroup; it is always among the parents.
    """
    mount = root / "sys/fs/cgroup"
    folders: list[Path] = []
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if not names:
            tops = [mount, mount / "unified"]
        elif controller in names.split(","):
            tops = [mount / names, mount / controller]
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        folders += [top.joinpath(*parts[:depth]) for top in tops for depth in range(len(parts), -1, -1)]
    return folders


def _affinity(logical: int) -> tuple[int, ...]:
    """Return the affinity mask; all logical cores where the system has no such call (macOS)."""
    try:
        return tuple(sorted(os.sched_getaffinity(0)))
    except (AttributeError, OSError):
        return tuple(range(logical))


def _ordered(present: set[str] | tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for word in INSTRUCTION_SETS if word in present)


def _machine_word() -> str:
    """Return `x86_64` or `arm64`, for a CPU without a model name."""
    return os.uname().machine if hasattr(os, "uname") else "unknown CPU"


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _sysctl(key: str) -> str | None:
    """Return one sysctl value (macOS); None if the key or the program is missing."""
    import subprocess

    try:
        done = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
