"""What matrix products and copies of this very machine reach, as `gptoughts bench gemm` measured them: a second yardstick beside the datasheet.

A datasheet's peak holds at a boost clock that few power limits sustain, and there is none for a CPU. The figures lie in the user's cache under
the device's name, its power limit and torch's version: each of the three changes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoughts.errors import ConfigError
from gptoughts.hardware.machine import Machine, World
from gptoughts.hardware.peak_flops import peaks

COMMAND = "gptoughts bench gemm"


@dataclass(frozen=True)
class Ceilings:
    """The best medians of one device. TFLOP/s by type of number, GB/s (10^9) by kind of copy; what was not measured is not there."""

    tflops: Mapping[str, float]
    gb_per_second: Mapping[str, float]
    measured: str
    """When, in UTC."""
    threads: int | None = None
    """Threads of torch, where a CPU was measured."""

    def share(self, flops_per_second: float, dtype: str) -> float | None:
        """The part of the measured product in `dtype` that `flops_per_second` is; None where that was not measured."""
        ceiling = self.tflops.get(dtype)
        return flops_per_second / (ceiling * 1e12) if ceiling else None


def cache_file() -> Path:
    """Where the figures lie: below XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "gptoughts" / "ceilings.json"


def key(machine: Machine) -> str:
    """What the figures hang on: device and power limit of the first GPU, or the CPU, and torch's version."""
    gpu = machine.gpus[0] if machine.gpus else None
    watts = f"{gpu.power_limit_watts:g} W" if gpu and gpu.power_limit_watts else "power limit n/a"
    return " | ".join([gpu.name if gpu else machine.label(), watts, f"torch {machine.packages.get('torch', 'n/a')}"])


def ceilings_for(machine: Machine) -> Ceilings | None:
    """What was measured on a device like the first of `machine`; None where nothing was, or where the file cannot be read."""
    row = _rows().get(key(machine))
    if not isinstance(row, dict):
        return None
    try:
        tables = [{str(name): float(value) for name, value in row[table].items()} for table in ("tflops", "gb_per_second")]
        return Ceilings(tables[0], tables[1], str(row["measured"]), row.get("threads"))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def keep_ceilings(machine: Machine, found: Ceilings) -> Path:
    """Put `found` into the cache, whole or not at all. What was reached before and is higher stays: a busy hour lowers no ceiling.

    Returns the file. Raises ConfigError where it cannot be written.
    """
    path, before = cache_file(), ceilings_for(machine)
    tflops = _higher(before.tflops if before else {}, found.tflops)
    speeds = _higher(before.gb_per_second if before else {}, found.gb_per_second)
    rows = {**_rows(), key(machine): {**vars(found), "tflops": tflops, "gb_per_second": speeds}}
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); set XDG_CACHE_HOME") from None
    return path


def reached(
    flops_per_token: int | None, machine: Machine, world: World, dtype: str
) -> tuple[Callable[[float], float | None], str]:
    """A function from tokens per second over all ranks to the share of the products in `dtype` measured here, and a line with its constant.

    As `mfu.utilization`, with the machine's own ceiling in the place of the datasheet's: None where either figure is not known. A rank
    has a GPU to itself; on a CPU the ranks of a host share what all its cores reached.
    """
    found = ceilings_for(machine)
    if flops_per_token is None:
        return (lambda speed: None), "of GEMM n/a: the model's size is not known"
    if found is None or dtype not in found.tflops:
        why = f"; {COMMAND} measures it" if found is None else f", which {COMMAND} could not measure"
        return (lambda speed: None), f"of GEMM n/a: no product in {dtype} was measured here{why}"
    flops = flops_per_token
    devices = world.world_size if machine.gpus else max(1, world.world_size // world.local_world_size)
    each = f"{found.tflops[dtype]:.4g} TFLOP/s{' per GPU' if machine.gpus else ''}"
    line = f"of GEMM = the model's operations per second / {each}, {dtype}, measured here, last {found.measured}"
    return (lambda speed: found.share(flops * speed / devices, dtype)), line


def datasheet(machine: Machine) -> dict[str, float]:
    """Dense TFLOP/s by type of number and `copy` in GB/s, of the first GPU; empty where its part is not known."""
    gpu = machine.gpus[0] if machine.gpus else None
    known = peaks(gpu.name, gpu.memory_bytes) if gpu else None
    if known is None:
        return {}
    found = {
        "bf16": known.bf16_tflops,
        "fp16": known.fp16_tflops,
        "fp8": known.fp8_tflops,
        "tf32": known.tf32_tflops,
        "copy": known.bandwidth_gb_s,
    }
    return {name: value for name, value in found.items() if value is not None}


def _higher(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: max(one.get(name, 0.0), other.get(name, 0.0)) for name in {**one, **other}}


def _rows() -> dict[str, Any]:
    try:
        rows = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # never measured, or damaged: the next measurement writes it anew
    return rows if isinstance(rows, dict) else {}
