"""Convert tokens per second to TFLOP/s, model FLOPs utilization (MFU) and the share of this machine's measured GEMM rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gptoughts.config.model_spec import ModelSpec, flops_per_token
from gptoughts.hardware.machine import Machine
from gptoughts.hardware.measured_peaks import gemm_utilization
from gptoughts.hardware.peak_flops import peaks
from gptoughts.hardware.world import World
from gptoughts.planning.plan import Plan

Mfu = Callable[[float], float | None]


def _unknown(speed: float) -> float | None:
    return None


@dataclass(frozen=True)
class Throughput:
    """Figures of a speed in tokens per second over all ranks. Unknown ones are None."""

    ranks: int = 1
    flops: int | None = None
    """Model FLOPs per token."""
    mfu: Mfu = _unknown
    of_gemm: Mfu = _unknown
    notes: tuple[str, ...] = ()
    """Formulas with their constants, for the console."""

    def row(self, speed: float) -> dict[str, float | None]:
        """Return the `perf/` keys of metrics.jsonl for a speed."""
        return {
            "perf/tokens_per_second": speed,
            "perf/tokens_per_second_per_gpu": speed / self.ranks,
            "perf/tflops_per_gpu": None if self.flops is None else self.flops * speed / self.ranks / 1e12,
            "perf/mfu": self.mfu(speed),
            "perf/of_gemm": self.of_gemm(speed),
        }


def throughput(spec: ModelSpec, plan: Plan, machine: Machine, world: World) -> Throughput:
    """Return the conversions for a model on this machine."""
    mfu, formula = utilization(spec, machine, world.world_size)
    of_gemm, ceiling = gemm_utilization(flops_per_token(spec), machine, world, plan.gemm_dtype)
    return Throughput(world.world_size, flops_per_token(spec), mfu, of_gemm, (formula, ceiling))


def utilization(spec: ModelSpec, machine: Machine, ranks: int) -> tuple[Mfu, str]:
    """Return a function from tokens per second over all ranks to MFU, and a line with its formula and constant.

    The function gives None where the model's size or the GPU's peak is unknown: a wrong constant is worse than none. FP8 runs are
    measured against the bf16 peak too, so that they can be compared. Source of the formula: `model_spec.flops_per_token`.
    """
    flops = flops_per_token(spec)
    gpu = machine.gpus[0] if machine.gpus else None
    peak = peaks(gpu.name, gpu.memory_bytes) if gpu else None
    if gpu is None:
        return _unknown, "MFU n/a: no peak is known for CPUs"
    if flops is None:
        return _unknown, "MFU n/a: model size unknown"
    if peak is None or peak.bf16_tflops is None:
        return _unknown, f"MFU n/a: no dense bf16 peak is known for {gpu.name}"
    per_second = peak.bf16_tflops * 1e12 * ranks
    return (lambda speed: flops * speed / per_second), (
        f"MFU = (6N + 12LCT) x tok/s / {peak.bf16_tflops:g} TFLOP/s per GPU, dense bf16 ({peak.source})"
    )
