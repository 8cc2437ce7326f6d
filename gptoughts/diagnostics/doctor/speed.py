"""Measure matmul and copy rates of each device and compare them with the data sheet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from gptoughts.diagnostics.doctor.finding import UNKNOWN, Check, Finding
from gptoughts.diagnostics.doctor.forks import Job, Outcome
from gptoughts.hardware.machine import Gpu, Machine
from gptoughts.hardware.peak_flops import peaks

# A matmul that fills every GPU of the table; on a CPU one that takes less than a second.
GPU_SIZE, CPU_SIZE = 8192, 1024
GPU_COPY_BYTES, CPU_COPY_BYTES = 1 << 30, 1 << 27
# The median is used: other programs disturb single measurements.
REPETITIONS = 5
# Achievable share of the data sheet on an H100 (torchao, testing/training/roofline_utils.py); used for every GPU.
REACHED_GEMM, REACHED_COPY = 0.78, 0.92
LEAST_SHARE = 0.7
# All ranks wait for the slowest GPU. Equal models differ by a few per cent from chip to chip.
LEAST_OF_FASTEST = 0.9
SOURCE = "data sheet times the share of an H100 in torchao's roofline"


def jobs(machine: Machine) -> list[Job]:
    """Return one job per device; they run alone, because concurrent jobs share CPU clock and power."""
    if not machine.gpus:
        return [Job("speed cpu", __name__, "child", ("cpu", 0.4), 30.0, "speed cpu")]
    # Less time each on machines with many GPUs.
    seconds = 1.0 if len(machine.gpus) <= 2 else 0.5
    return [
        Job(f"speed {gpu.index}", __name__, "child", (f"cuda:{gpu.index}", seconds), 45.0, f"speed {gpu.index}")
        for gpu in machine.gpus
    ]


def child(name: str, seconds: float) -> dict[str, Any]:
    """Measure device `name` for `seconds` per kind: TFLOP/s by dtype, GB/s of a copy (bytes read plus written)."""
    import torch

    from gptoughts.diagnostics.timing import timed

    device = torch.device(name)
    on_gpu = device.type == "cuda"
    size, copied = (GPU_SIZE, GPU_COPY_BYTES) if on_gpu else (CPU_SIZE, CPU_COPY_BYTES)

    def seconds_of(work: Callable[[], Any], patience: float = seconds) -> float:
        return median(timed(work, device, patience / REPETITIONS, REPETITIONS))

    half = torch.bfloat16 if not on_gpu or torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    figures: dict[str, Any] = {"threads": torch.get_num_threads(), "size": size, "tflops": {}}
    for kind in (half,) if on_gpu else (torch.float32, half):
        one, other = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))  # zeros draw less power
        into = torch.empty_like(one)
        product = seconds_of(lambda a=one, b=other, c=into: torch.mm(a, b, out=c))  # type: ignore[misc]
        figures["tflops"][str(kind).removeprefix("torch.")] = 2 * size**3 / product / 1e12
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    figures["copy_gb_s"] = 2 * copied / seconds_of(lambda: target.copy_(source)) / 1e9
    if on_gpu:
        pinned = torch.empty(copied // 4, dtype=torch.uint8, pin_memory=True)
        part = target[: copied // 4]
        moved = copied // 4 / 1e9
        figures["to_gpu_gb_s"] = moved / seconds_of(lambda: part.copy_(pinned, non_blocking=True), seconds / 4)
        figures["from_gpu_gb_s"] = moved / seconds_of(lambda: pinned.copy_(part, non_blocking=True), seconds / 4)
    return figures


def judge(machine: Machine, outcomes: dict[str, Outcome]) -> Check:
    """Return figures per device, and findings for GPUs of the peak table."""
    if not machine.gpus:
        outcome = outcomes.get("speed cpu")
        if outcome is None:
            return Check("speed")
        if outcome.trouble:
            what = f"matmul on the CPU failed: {outcome.trouble}"
            return Check("speed", ("not measured",), (Finding(what, "python -m gptoughts doctor --json", "costs"),))
        return Check("speed", (_cpu_row(outcome.figures or {}),), (), {"cpu": outcome.figures})
    rows, findings, figures = [], [], {}
    for gpu in machine.gpus:
        outcome = outcomes.get(f"speed {gpu.index}")
        if outcome is None:
            continue
        if outcome.trouble:
            findings.append(_failed(gpu, outcome))
            continue
        figures[str(gpu.index)] = outcome.figures
        rows.append(_gpu_row(gpu, outcome.figures or {}))
        findings += _gpu_findings(gpu, outcome.figures or {})
    findings += _stragglers(machine, figures)
    return Check("speed", tuple(rows or ["not measured"]), tuple(findings), figures)


def _failed(gpu: Gpu, outcome: Outcome) -> Finding:
    mend = f"nvidia-smi -i {gpu.index}; dmesg | grep -i -e nvrm -e xid"
    return Finding(f"GPU {gpu.index}: matmul failed: {outcome.trouble}", mend, "costs", "the GPU is not used")


def _cpu_row(figures: dict[str, Any]) -> str:
    rates = ", ".join(f"{kind} {rate * 1000:,.0f} GFLOP/s" for kind, rate in figures["tflops"].items())
    threads = "1 thread" if figures["threads"] == 1 else f"{figures['threads']} threads"
    return f"{rates}, copy {figures['copy_gb_s']:.1f} GB/s ({threads}; no table for CPUs)"


def _gpu_row(gpu: Gpu, figures: dict[str, Any]) -> str:
    kind, rate = next(iter(figures["tflops"].items()))
    known = peaks(gpu.name, gpu.memory_bytes)
    peak = _peak(gpu)
    of_peak = f" ({rate / peak:.0%} of {peak:,.4g})" if peak else " (peak n/a)"
    width = known.bandwidth_gb_s if known else None
    of_width = f" ({figures['copy_gb_s'] / width:.0%} of {width:,.0f})" if width else ""
    host = [f"{figures[key]:.0f}" if key in figures else UNKNOWN for key in ("to_gpu_gb_s", "from_gpu_gb_s")]
    words = f"gpu {gpu.index}: {kind} {rate:,.0f} TFLOP/s{of_peak}, copy {figures['copy_gb_s']:,.0f} GB/s{of_width}"
    return f"{words}, host {'/'.join(host)} GB/s"


def _peak(gpu: Gpu) -> float | None:
    """Return the dense peak of the measured dtype: bf16, or fp16 before Ampere."""
    known = peaks(gpu.name, gpu.memory_bytes)
    return (known.bf16_tflops or known.fp16_tflops) if known else None


def _gpu_findings(gpu: Gpu, figures: dict[str, Any]) -> Iterator[Finding]:
    known, peak = peaks(gpu.name, gpu.memory_bytes), _peak(gpu)
    if known is None:
        return
    reset = f"sudo nvidia-smi -i {gpu.index} -rgc -rmc; nvidia-smi -i {gpu.index} -q -d PERFORMANCE,POWER shows the throttle reasons"
    rate = next(iter(figures["tflops"].values()))
    for what, reached, achievable, unit in (
        ("matmul", rate, peak and peak * REACHED_GEMM, "TFLOP/s"),
        ("memory copy", figures["copy_gb_s"], known.bandwidth_gb_s and known.bandwidth_gb_s * REACHED_COPY, "GB/s"),
    ):
        if achievable and reached < LEAST_SHARE * achievable:
            words = f"GPU {gpu.index}: {what} {reached:,.0f} {unit}, expected {achievable:,.0f}"
            yield Finding(words, reset, "costs", f"{what} at {reached / achievable:.0%} of the expected rate", SOURCE)


def _stragglers(machine: Machine, figures: dict[str, Any]) -> Iterator[Finding]:
    """Yield a finding for each GPU slower than an equal one: it delays every rank."""
    rates = {gpu: next(iter(figures[str(gpu.index)]["tflops"].values())) for gpu in machine.gpus if str(gpu.index) in figures}
    for gpu, rate in rates.items():
        fastest = max(other for twin, other in rates.items() if twin.name == gpu.name)
        if rate < LEAST_OF_FASTEST * fastest:
            what = f"GPU {gpu.index}: matmul at {rate / fastest:.0%} of an equal GPU of this machine"
            free = ",".join(str(one.index) for one in machine.gpus if one is not gpu)
            mend = f"nvidia-smi -i {gpu.index} -q -d PERFORMANCE; or leave it out: CUDA_VISIBLE_DEVICES={free}"
            yield Finding(
                what, mend, "costs", f"all ranks wait for it, up to {1 - rate / fastest:.0%} of a step", "measured here"
            )
