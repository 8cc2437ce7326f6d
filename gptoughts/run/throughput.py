"""Convert tokens per second to TFLOP/s, model FLOPs utilization (MFU) and the share of this machine's measured GEMM rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gptoughts.config.loader import Recipe
from gptoughts.config.model_spec import ModelSpec
from gptoughts.hardware.machine import Machine
from gptoughts.hardware.measured_peaks import gemm_utilization
from gptoughts.hardware.peak_flops import peaks
from gptoughts.hardware.world import World
from gptoughts.planning.flops import plan_flops
from gptoughts.planning.layer import Layer
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
    hardware_flops: int | None = None
    """FLOPs per token with recomputed forwards."""

    def row(self, speed: float) -> dict[str, float | None]:
        """Return the `perf/` keys of metrics.jsonl for a speed."""
        return {
            "perf/tokens_per_second": speed,
            "perf/tokens_per_second_per_gpu": speed / self.ranks,
            "perf/tflops_per_gpu": None if self.flops is None else self.flops * speed / self.ranks / 1e12,
            "perf/mfu": self.mfu(speed),
            "perf/hfu": self._hfu(speed),
            "perf/of_gemm": self.of_gemm(speed),
        }

    def _hfu(self, speed: float) -> float | None:
        mfu = self.mfu(speed)
        if mfu is None or not self.flops or self.hardware_flops is None:
            return None
        return mfu * self.hardware_flops / self.flops


def throughput(
    spec: ModelSpec, recipe: Recipe, plan: Plan, machine: Machine, world: World, catalog: Mapping[str, Layer]
) -> Throughput:
    """Return the conversions for a plan on this machine."""
    flops = plan_flops(spec, recipe, plan, catalog)
    mfu, formula = utilization(flops.model, machine, world.world_size, flops.formula)
    of_gemm, ceiling = gemm_utilization(flops.model, machine, world, plan.gemm_dtype)
    return Throughput(world.world_size, flops.model, mfu, of_gemm, (formula, ceiling), flops.hardware)


def utilization(flops: int | None, machine: Machine, ranks: int, formula: str = "6N + 12LCT") -> tuple[Mfu, str]:
    """Return a function from tokens per second over all ranks to MFU, and a line with its formula and constant.

    `flops` are the model's per token. The function gives None where they or the GPU's peak are unknown: a wrong constant is worse than
    none. FP8 runs are measured against the bf16 peak too, so that they can be compared.
    """
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
        f"MFU = ({formula}) x tok/s / {peak.bf16_tflops:g} TFLOP/s per GPU, dense bf16 ({peak.source})"
    )
