"""Measure the peak rates of this machine: matmul by dtype and size, and memory copies.

An n x n matmul is 2 n^3 operations. Sizes double until one matmul takes too long or does not fit, so that slow dtypes stop early and fast
ones reach their peak. Every figure is a median over repetitions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gptoughts.console import share
from gptoughts.diagnostics.bench.figures import machine_figures, spread
from gptoughts.diagnostics.bench.text import Row, aligned, markdown
from gptoughts.diagnostics.bench.variant import clock_mhz
from gptoughts.diagnostics.timing import timed
from gptoughts.hardware.machine import Machine
from gptoughts.hardware.measured_peaks import MeasuredPeaks, datasheet, key
from gptoughts.models.torch_internals import scaled_matmul

Say = Callable[[str], None]

LEAST_CAPABILITY = {"tf32": (8, 0), "bf16": (8, 0), "fp8": (8, 9)}
"""Minimum compute capability by dtype."""
NOT_ON_CPUS = ("tf32", "fp8")
"""Emulated on CPUs."""


@dataclass(frozen=True)
class Effort:
    """Measurement effort: sizes, maximum seconds of one matmul, seconds per timing, repetitions, bytes per copy."""

    sizes: tuple[int, ...]
    most_seconds: float
    timing_seconds: float
    repetitions: int
    copy_bytes: int


def device_for(machine: Machine) -> torch.device:
    """Return the first GPU, or the CPU."""
    return torch.device("cuda" if machine.gpus and torch.cuda.is_available() else "cpu")


def effort_for(machine: Machine, largest: int | None = None) -> Effort:
    """Return an effort of one or two minutes, less with a smaller `largest` size. Copies exceed the caches of most machines."""
    full = _full_effort(device_for(machine), machine)
    sizes = tuple(size for size in full.sizes if largest is None or size <= largest)
    return replace(full, sizes=sizes or (largest or full.sizes[0],))


def _full_effort(device: torch.device, machine: Machine) -> Effort:
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return Effort((1024, 2048, 4096, 8192, 16384), 1.0, 0.2, 7, min(2**30, free // 8))
    return Effort((256, 512, 1024, 2048, 4096), 0.6, 0.1, 7, min(2**28, (machine.memory_bytes or 2**33) // 32))


def bench_gemm(machine: Machine, command: str, say: Say = lambda text: None, effort: Effort | None = None) -> dict[str, Any]:
    """Return all figures as plain data."""
    device, effort = device_for(machine), effort or effort_for(machine)
    began = time.perf_counter()
    products: dict[str, Any] = {}
    for dtype in ("fp32", "tf32", "bf16", "fp16", "fp8"):
        say(f"matmul {dtype}")
        products[dtype] = _products(dtype, device, effort)
    say("copies")
    copies = _copies(device, effort)
    known = machine_figures(machine)
    if device.type == "cuda":
        known["clock_mhz"] = clock_mhz()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {
        "what": "bench gemm", "command": command, "device": key(machine), "machine": known, "measured": stamp,
        "seconds_in_all": round(time.perf_counter() - began, 1), "products": products, "copies": copies,
        "copy_bytes": effort.copy_bytes, "datasheet": datasheet(machine),
    }  # fmt: skip


def measured_peaks_of(run: Mapping[str, Any]) -> MeasuredPeaks:
    """Return the best median of every dtype and kind of copy."""
    best = {dtype: row["best_tflops"] for dtype, row in run["products"].items() if row["best_tflops"] is not None}
    speeds = {name: row["gb_per_second"]["median"] for name, row in run["copies"].items() if "gb_per_second" in row}
    return MeasuredPeaks(best, speeds, run["measured"], None if "clock_mhz" in run["machine"] else run["machine"]["threads"])


def _products(dtype: str, device: torch.device, effort: Effort) -> dict[str, Any]:
    """Return TFLOP/s by size, the best median, and why sizes are missing."""
    rows: dict[str, Any] = {"sizes": {}, "best_tflops": None, "why": ""}
    least = LEAST_CAPABILITY.get(dtype)
    if least and (dtype in NOT_ON_CPUS if device.type == "cpu" else torch.cuda.get_device_capability(device) < least):
        return {**rows, "why": f"needs a GPU of compute capability {least[0]}.{least[1]}"}
    seconds = 0.0
    for size in effort.sizes:
        if 8 * seconds > effort.most_seconds:  # doubling the size is 8 times the work
            rows["why"] = f"{size} skipped: one matmul would take {8 * seconds:.1f} s"
            break
        try:
            with _arithmetic(dtype):
                product = _product(dtype, size, device)
                times = timed(product, device, effort.timing_seconds, effort.repetitions)
        except (RuntimeError, AttributeError) as error:  # out of memory and missing kernels are RuntimeErrors
            rows["why"] = f"{size}: {str(error).splitlines()[0][:200]}"
            break
        seconds = spread(times, 9)["median"]
        rows["sizes"][str(size)] = spread([2 * size**3 / one / 1e12 for one in times], 7)
    medians = [row["median"] for row in rows["sizes"].values()]
    rows["best_tflops"] = max(medians, default=None)
    return rows


@contextmanager
def _arithmetic(dtype: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _product(dtype: str, size: int, device: torch.device) -> Callable[[], Any]:
    """Return a matmul of two random normal matrices, into preallocated memory if torch supports it."""
    made = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
    left, right = (torch.randn(size, size, device=device).to(made[dtype]) for _ in range(2))
    if dtype != "fp8":
        out = torch.empty_like(left)
        return lambda: torch.mm(left, right, out=out)
    eights = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t().contiguous().t()
    scale, scaled = torch.ones((), device=device), scaled_matmul()
    return lambda: scaled(*eights, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True)


def _copies(device: torch.device, effort: Effort) -> dict[str, Any]:
    """Measure GB/s (10^9) of every kind of copy: bytes read plus written within one memory, bytes transferred across the bus."""
    count = effort.copy_bytes // 4
    works: dict[str, tuple[Callable[[], Any], int]] = {}
    source, target = torch.ones(count, device=device), torch.empty(count, device=device)
    works["copy"] = (lambda: target.copy_(source), 2)
    works["triad"] = (lambda: torch.add(source, target, alpha=0.5, out=target), 3)
    if device.type == "cuda":
        pinned = torch.ones(count, pin_memory=True)
        works["host to device, pinned"] = (lambda: target.copy_(pinned, non_blocking=True), 1)
        works["device to host, pinned"] = (lambda: pinned.copy_(source, non_blocking=True), 1)
    target.copy_(source)  # touch its pages before timing
    return {name: _copied(work, 4 * count * passes, device, effort) for name, (work, passes) in works.items()}


def _copied(work: Callable[[], Tensor], moved: int, device: torch.device, effort: Effort) -> dict[str, Any]:
    try:
        return {
            "gb_per_second": spread(
                [moved / one / 1e9 for one in timed(work, device, effort.timing_seconds, effort.repetitions)], 3
            )
        }
    except RuntimeError as error:
        return {"why": str(error).splitlines()[0][:200]}


def gemm_text(run: Mapping[str, Any]) -> str:
    """Return the tables as text."""
    return "\n".join(
        [*_head(run), "", *aligned(_rows(run)), "", *aligned(_copy_rows(run)), *(f"  {line}" for line in _why(run))]
    )


def gemm_markdown(runs: list[dict[str, Any]]) -> str:
    """Return all runs of a file as Markdown."""
    lines = ["# Matmul and copy rates", "", "Made by `gptoughts bench gemm`; docs/bench.md says how to read it.", ""]
    for run in runs:
        lines += [f"## {run['machine']['label']}", "", *(f"{line}  " for line in _head(run)[1:]), ""]
        lines += [*markdown(_rows(run)), "", *markdown(_copy_rows(run)), "", *(f"- {line}" for line in _why(run)), ""]
    return "\n".join(lines).rstrip() + "\n"


def _head(run: Mapping[str, Any]) -> list[str]:
    machine = run["machine"]
    watts = machine.get("power_limit_watts")
    power = f"power limit {watts:g} W, " if watts else ""
    clock = f", clock {machine['clock_mhz']} MHz after the measurement" if machine.get("clock_mhz") else ""
    return [
        f"matmul and copies on {machine['label']}",
        f"{power}torch {machine['torch']}, {machine['threads']} threads, load {machine['load_average']}{clock}; {run['measured']}",
    ]


def _rows(run: Mapping[str, Any]) -> list[Row]:
    sizes = sorted({int(size) for row in run["products"].values() for size in row["sizes"]})
    rows: list[Row] = [("TFLOP/s", *(f"{size}^3" for size in sizes), "best", "datasheet", "reached")]
    for dtype, row in run["products"].items():
        cells = [f"{row['sizes'][str(size)]['median']:.4g}" if str(size) in row["sizes"] else "" for size in sizes]
        rows.append((dtype, *cells, *_beside(row["best_tflops"], run["datasheet"].get(dtype))))
    return rows


def _beside(found: float | None, promised: float | None) -> tuple[str, str, str]:
    """Return measured rate, data sheet, and their ratio."""
    return (
        "n/a" if found is None else f"{found:.4g}",
        "n/a" if promised is None else f"{promised:g}",
        share(found / promised if found is not None and promised else None),
    )


def _copy_rows(run: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = [("GB/s", "median", "min", "max", "datasheet", "reached")]
    for name, row in run["copies"].items():
        found = row.get("gb_per_second")
        spans = (f"{found['min']:.4g}", f"{found['max']:.4g}") if found else ("", "")
        median, promised, reached = _beside(
            found and found["median"], run["datasheet"].get("copy") if name in ("copy", "triad") else None
        )
        rows.append((name, median, *spans, promised, reached))
    return rows


def _why(run: Mapping[str, Any]) -> list[str]:
    """Return missing entries of the tables, with the reason."""
    return [f"{name}: {row['why']}" for name, row in [*run["products"].items(), *run["copies"].items()] if row.get("why")]
