"""Model FLOPs utilization: the share of the GPU's dense bf16 peak that the model's own arithmetic reaches, or nothing at all."""

from __future__ import annotations

from collections.abc import Callable

from gptoughts.config.model_spec import ModelSpec, flops_per_token
from gptoughts.hardware.machine import Machine
from gptoughts.hardware.peak_flops import peaks

Mfu = Callable[[float], float | None]


def utilization(spec: ModelSpec, machine: Machine, ranks: int) -> tuple[Mfu, str]:
    """A function from tokens per second over all ranks to MFU, and a line with its formula and constant.

    Where the model's size or the GPU's peak is not known it gives None: a wrong constant is worse than none. Runs in FP8 are
    measured against the bf16 peak too, so that they can be compared. Source of the formula: `facts.flops_per_token`.
    """
    flops = flops_per_token(spec)
    gpu = machine.gpus[0] if machine.gpus else None
    peak = peaks(gpu.name, gpu.memory_bytes) if gpu else None
    if gpu is None:
        return _unknown, "MFU n/a: the peak of a CPU is not known"
    if flops is None:
        return _unknown, "MFU n/a: the model's size is not known"
    if peak is None or peak.bf16_tflops is None:
        return _unknown, f"MFU n/a: no dense bf16 peak is known for {gpu.name}"
    per_second = peak.bf16_tflops * 1e12 * ranks
    return (lambda speed: flops * speed / per_second), (
        f"MFU = (6N + 12LCT) x tok/s / {peak.bf16_tflops:g} TFLOP/s per GPU, dense bf16 ({peak.source})"
    )


def _unknown(speed: float) -> float | None:
    return None
