"""Ablate a plan: measure the plan without each layer and the baseline with each layer, in interleaved child processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gptoughts.api import ResolvedRun
from gptoughts.diagnostics.bench.children import Result, Say, Turns, measure
from gptoughts.diagnostics.bench.curves import mean_difference
from gptoughts.diagnostics.bench.figures import machine_figures, spread
from gptoughts.diagnostics.bench.gains import BASELINE, PLAN, gains, with_, without
from gptoughts.diagnostics.bench.variant import Job
from gptoughts.diagnostics.bench.variants import Layers, RunRequest, baseline_of, job_of, layers_of, plan_of, why_not, with_slot
from gptoughts.errors import LayerError, PlanError
from gptoughts.hardware.machine import Machine
from gptoughts.hardware.measured_peaks import gemm_utilization, measured_peaks_for
from gptoughts.hardware.world import World
from gptoughts.planning.resolve import Plan


@dataclass
class Variants:
    """Variants by name, and left-out ones with the reason. Names with the same layers are measured once."""

    plans: dict[str, Plan] = field(default_factory=dict)
    same_as: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    """Slot -> the plan's layer, if it is not the baseline."""

    def add(self, name: str, make: Callable[[], Plan]) -> None:
        """Add a variant; if it has no valid plan, keep the reason."""
        try:
            plan = make()
        except PlanError as error:
            self.left_out[name] = why_not(error)
            return
        twin = next((other for other, known in self.plans.items() if layers_of(known) == layers_of(plan)), None)
        if twin is not None:
            self.same_as[name] = twin
        else:
            self.plans[name] = plan


def variants_of(setting: ResolvedRun, ask: RunRequest) -> Variants:
    """Return plan and baseline, and for every slot in which they differ the plan without the layer and the baseline with it.

    Raises PlanError if plan or baseline cannot run on this machine.
    """
    whole, nothing = layers_of(setting.plan), baseline_of(setting)
    found = Variants()
    found.parts = {slot: layer for slot, layer in setting.plan.layers.items() if layer != nothing[slot]}

    def adding(name: str, layers: Layers) -> None:
        found.add(name, lambda: plan_of(setting, ask, layers))

    adding(BASELINE, nothing)
    adding(PLAN, whole)
    for slot, layer in found.parts.items():
        adding(without(layer), with_slot(whole, slot, nothing))
        adding(with_(layer), with_slot(nothing, slot, whole))
    for end in (BASELINE, PLAN):
        if end in found.left_out:
            raise PlanError(f"bench layers: the {end} cannot run on {setting.machine.label()}: {found.left_out[end]}")
    return found


def bench_layers(
    setting: ResolvedRun,
    ask: RunRequest,
    rounds: int,
    steps: int,
    command: str,
    say: Say = lambda text: None,
    *,
    turns: Turns | None = None,
) -> dict[str, Any]:
    """Return the figures of the ablation as plain data; `say` receives progress lines.

    Raises errors of recipe and data, and LayerError if the plan has only baselines.
    """
    variants = variants_of(setting, ask)
    if not variants.parts:
        raise LayerError("bench layers: every slot of this plan has its baseline", fix="--layer.SLOT NAME")
    jobs = _jobs(setting, ask, variants)
    began, load = time.perf_counter(), [round(os.getloadavg()[0], 2)]

    def log_load(text: str) -> None:
        if text.startswith("round"):
            load.append(round(os.getloadavg()[0], 2))
        say(text)

    results, how = measure(jobs, rounds, steps, log_load, turns=turns)
    seconds = time.perf_counter() - began
    return _run(setting, variants, results, {
        "command": command, "rounds": rounds, "steps_per_round": steps, "processes": str(how),
        "seconds_in_all": round(seconds, 1), "load_averages": load,
    })  # fmt: skip


def _jobs(setting: ResolvedRun, ask: RunRequest, variants: Variants) -> dict[str, Job]:
    """Return jobs with equal warm-up, so that step n of every variant is the same step of the same training."""
    made = {name: job_of(setting, ask, plan) for name, plan in variants.plans.items()}
    warm = max(job.warmup_steps for job in made.values())
    return {name: job_of(setting, ask, plan, warm) for name, plan in variants.plans.items()}


def _run(setting: ResolvedRun, variants: Variants, results: Mapping[str, Result], how: Mapping[str, Any]) -> dict[str, Any]:
    ready = next((one.ready for one in results.values() if one.ready), {})
    machine = machine_figures(setting.machine, ready.get("threads"))
    machine["threads_of_variants"] = {name: one.ready.get("threads") for name, one in results.items()}
    ceilings = measured_peaks_for(setting.machine)
    rows = {
        name: _row(variants, name, one, baseline=results[BASELINE], ready=ready, machine=setting.machine)
        for name, one in results.items()
    }
    return {
        "what": "bench layers",
        **how,
        "machine": machine,
        "recipe": setting.resolved.recipe.name,
        "model": ready.get("model", {}),
        "global_batch": setting.resolved.recipe.train.global_batch,
        "tokens_per_step": ready.get("tokens_per_step"),
        "profile": setting.plan.profile,
        "plan": setting.plan.layers,
        "parts": variants.parts,
        "memory": MEMORY[ready.get("device", "cpu")],
        "mfu_formula": ready.get("mfu_formula", ""),
        "gemm_ceilings": None if ceilings is None else {"tflops": dict(ceilings.tflops), "measured": ceilings.measured},
        "variants": rows,
        "same_as": variants.same_as,
        "left_out": variants.left_out,
        **gains(variants.parts, _seconds(variants, results)),
    }


MEMORY = {
    "cuda": "peak bytes allocated by torch on the GPU in the counted steps (max_memory_allocated)",
    "cpu": "peak resident bytes of the process up to the last uncounted step, minus those before the model was built (VmHWM - VmRSS); "
    "compiler memory included",
}


def _seconds(variants: Variants, results: Mapping[str, Result]) -> dict[str, list[float]]:
    """Return seconds per step and round of counted variants, under every name."""
    counted = {name: one.seconds for name, one in results.items() if one.counted}
    twins = {name: counted[twin] for name, twin in variants.same_as.items() if twin in counted}
    return counted | twins


def _row(
    variants: Variants, name: str, result: Result, *, baseline: Result, ready: Mapping[str, Any], machine: Machine
) -> dict[str, Any]:
    plan = variants.plans[name]
    row: dict[str, Any] = {
        "layers": {slot: plan.layers[slot] for slot in variants.parts},
        "environment": dict(plan.environment),
        "start_seconds": None if result.start_seconds is None else round(result.start_seconds, 2),
        "first_step_seconds": round(result.ready["first_step_seconds"], 2) if result.ready else None,
        "evidence": {
            line["slot"]: f"{line['status']}: {line['proof']}"
            for line in result.ready.get("evidence", ())
            if line["slot"] in variants.parts and line["proof"] != "baseline"
        },
        "failure": result.failure,
    }
    if not result.counted:
        return row
    milliseconds = spread([1000 * value for value in result.seconds], 3)
    speed = ready["tokens_per_step"] / (milliseconds["median"] / 1000)
    per_token = ready["mfu_per_token_per_second"]
    difference = mean_difference(result.losses, baseline.losses)
    return row | {
        "step_ms": milliseconds,
        "rounds_ms": [round(1000 * value, 3) for value in result.seconds],
        "tokens_per_second": round(speed, 1),
        "mfu": None if per_token is None else per_token * speed,
        "share_of_gemm": gemm_utilization(ready["flops_per_token"], machine, World(), plan.gemm_dtype)[0](speed),
        "gemm_dtype": plan.gemm_dtype,
        "peak_bytes": result.peak_bytes,
        "clock_mhz": spread(result.clock_mhz, 0) if result.clock_mhz else None,
        "last_loss": round(result.losses[-1], 5),
        "loss_steps": len(result.losses),
        "loss_difference": difference,
    }
