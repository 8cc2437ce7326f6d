"""Measured matmul and copy rates of this machine, from `gptoughts bench gemm`: a second reference beside the datasheet.

Few power limits sustain the boost clock of a datasheet peak, and a CPU has no datasheet peak. The figures are cached per user, keyed by
device name, power limit and torch version, each of which changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoughts.errors import ConfigError
from gptoughts.files import cache_dir, load_json, make_private, write_json
from gptoughts.hardware.machine import Machine
from gptoughts.hardware.peak_flops import peaks
from gptoughts.hardware.world import World

COMMAND = "gptoughts bench gemm"


@dataclass(frozen=True)
class MeasuredPeaks:
    """Best medians of one device: TFLOP/s by dtype, GB/s (10^9) by kind of copy. Contains only measured entries."""

    tflops: Mapping[str, float]
    gb_per_second: Mapping[str, float]
    measured: str
    """Time of the measurement, UTC."""
    threads: int | None = None
    """torch threads, for a CPU."""

    def share(self, flops_per_second: float, dtype: str) -> float | None:
        """Return `flops_per_second` as a fraction of the measured matmul rate in `dtype`; None if not measured."""
        ceiling = self.tflops.get(dtype)
        return flops_per_second / (ceiling * 1e12) if ceiling else None


def cache_file() -> Path:
    """Return the path of the cached figures, below XDG_CACHE_HOME or ~/.cache."""
    return cache_dir("ceilings.json")


def key(machine: Machine) -> str:
    """Return the cache key: name and power limit of the first GPU, or the CPU, and the torch version."""
    gpu = machine.gpus[0] if machine.gpus else None
    watts = f"{gpu.power_limit_watts:g} W" if gpu and gpu.power_limit_watts else "power limit n/a"
    return " | ".join([gpu.name if gpu else machine.label(), watts, f"torch {machine.packages.get('torch', 'n/a')}"])


def measured_peaks_for(machine: Machine) -> MeasuredPeaks | None:
    """Return the figures measured on a device like the first of `machine`; None if there are none or the file is unreadable."""
    row = _rows().get(key(machine))
    if not isinstance(row, dict):
        return None
    try:
        tables = [{str(name): float(value) for name, value in row[table].items()} for table in ("tflops", "gb_per_second")]
        return MeasuredPeaks(tables[0], tables[1], str(row["measured"]), row.get("threads"))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def save_measured_peaks(machine: Machine, found: MeasuredPeaks) -> Path:
    """Merge `found` into the cache atomically and return the file. The higher figure is kept, so that a busy machine lowers none.

    Raises ConfigError if the file cannot be written.
    """
    path, before = cache_file(), measured_peaks_for(machine)
    tflops = _higher(before.tflops if before else {}, found.tflops)
    speeds = _higher(before.gb_per_second if before else {}, found.gb_per_second)
    rows = {**_rows(), key(machine): {**vars(found), "tflops": tflops, "gb_per_second": speeds}}
    try:
        make_private(path.parent)
        write_json(path, rows, shared=True)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot write it ({error.strerror})", fix="set XDG_CACHE_HOME to a writable folder"
        ) from None
    return path


def gemm_utilization(
    flops_per_token: int | None, machine: Machine, world: World, dtype: str
) -> tuple[Callable[[float], float | None], str]:
    """Return a function from tokens per second (all ranks) to the fraction of the measured matmul rate, and a line with its constant.

    As `mfu.utilization`, with the measured rate instead of the datasheet peak; None if either figure is unknown. Each rank has its own
    GPU; on a CPU the ranks of a host share the rate of all its cores.
    """
    found = measured_peaks_for(machine)
    if flops_per_token is None:
        return (lambda speed: None), "of GEMM n/a: model size unknown"
    if found is None or dtype not in found.tflops:
        why = f"run {COMMAND}" if found is None else f"{COMMAND} could not measure it"
        return (lambda speed: None), f"of GEMM n/a: no measured matmul rate in {dtype}; {why}"
    flops = flops_per_token
    devices = world.world_size if machine.gpus else max(1, world.world_size // world.local_world_size)
    each = f"{found.tflops[dtype]:.4g} TFLOP/s{' per GPU' if machine.gpus else ''}"
    line = f"of GEMM = model FLOP/s / {each}, {dtype}, measured on this machine, last {found.measured}"
    return (lambda speed: found.share(flops * speed / devices, dtype)), line


def datasheet(machine: Machine) -> dict[str, float]:
    """Return datasheet peaks of the first GPU: dense TFLOP/s by dtype and `copy` in GB/s; empty if the part is unknown."""
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
        rows = load_json(cache_file())
    except (OSError, ValueError):
        return {}  # not measured yet, or damaged: the next measurement rewrites the file
    return rows if isinstance(rows, dict) else {}
