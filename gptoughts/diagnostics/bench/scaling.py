"""Measure strong and weak scaling against a single process of equal settings, in interleaved process groups.

Strong: the global batch is fixed, every rank computes a share of it. Weak: every rank computes the single process's batch. Speed-up is a
ratio of tokens per second within a round, efficiency the speed-up over the number of ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from gptoughts.api import ResolvedRun
from gptoughts.diagnostics.bench.children import Result, Say, Turns, measure
from gptoughts.diagnostics.bench.curves import mean_difference
from gptoughts.diagnostics.bench.equal_settings import refuse_unequal
from gptoughts.diagnostics.bench.figures import machine_figures, spread
from gptoughts.diagnostics.bench.scaling_arms import BASE, STRONG, Arm, Arms, ScalingRequest, arms_of
from gptoughts.diagnostics.bench.variants import RunRequest

MEMORY = {
    "cuda": "peak bytes allocated by torch on the GPU of a rank in the counted steps (max_memory_allocated), largest rank",
    "cpu": "peak resident bytes of a rank's process up to the last uncounted step, minus those before the model was built "
    "(VmHWM - VmRSS), largest rank",
}


BUSY = 0.25
"""Load average per usable core before the first run from which other programs disturb ranks that need all cores."""


def bench_scaling(
    setting: ResolvedRun, ask: RunRequest, request: ScalingRequest, *, rounds: int, steps: int, command: str,
    say: Say = lambda text: None, turns: Turns | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the figures as plain data; `say` receives progress lines.

    Raises errors of recipe and data, PlanError for a strategy that cannot run, and ConfigError if the processes turn out to differ in a
    setting.
    """
    arms = arms_of(setting, ask, request)
    began, load = time.perf_counter(), [round(os.getloadavg()[0], 2)]

    def log_load(text: str) -> None:
        if text.startswith("round"):
            load.append(round(os.getloadavg()[0], 2))
        say(text)

    results, how = measure(arms.jobs, rounds, steps, log_load, turns=turns)
    shared = _shared_settings(arms, results)
    ready = next((one.ready for one in results.values() if one.ready), {})
    return {
        "what": "bench scaling",
        "command": command,
        "rounds": rounds,
        "steps_per_round": steps,
        "processes": str(how),
        "seconds_in_all": round(time.perf_counter() - began, 1),
        "load_averages": load,
        "busy_before": load[0] > BUSY * setting.machine.cpu.usable_cores,
        "machine": machine_figures(setting.machine, request.threads),
        "threads_per_rank": request.threads,
        "recipe": setting.resolved.recipe.name,
        "model": ready.get("model", {}),
        "global_batch": setting.resolved.recipe.train.global_batch,
        "profile": setting.plan.profile,
        "plan": {slot: layer for slot, layer in setting.plan.layers.items() if f"layer.{slot}.layer" in shared},
        "settings": shared,
        "memory": MEMORY[ready.get("device", "cpu")],
        "arms": _rows(arms, results, steps, _limit(setting, request)),
        "left_out": arms.left_out,
    }


def _limit(setting: ResolvedRun, request: ScalingRequest) -> int:
    """Return the ranks that have cores, or GPUs, of their own."""
    return len(setting.machine.gpus) or setting.machine.cpu.usable_cores // request.threads


def _shared_settings(arms: Arms, results: Mapping[str, Result]) -> dict[str, Any]:
    """Return the settings that the processes of all started arms have in common. Raises ConfigError if they differ."""
    found = {name: one.ready.get("settings_of_ranks", [one.ready["settings"]]) for name, one in results.items() if one.ready}
    return refuse_unequal(found, {name: arm.global_batch for name, arm in arms.arms.items()}) if found else {}


def _rows(arms: Arms, results: Mapping[str, Result], steps: int, limit: int) -> dict[str, Any]:
    base = results[BASE]
    return {
        name: {
            "kind": arm.kind,
            "strategy": arm.strategy,
            "ranks": arm.ranks,
            "global_batch": arm.global_batch,
            "oversubscribed": arm.ranks > limit,
            **_measured(arm, results[name], base, arms.arms[BASE].global_batch, steps),
        }
        for name, arm in arms.arms.items()
    }


def _measured(arm: Arm, result: Result, base: Result, batch: int, steps: int) -> dict[str, Any]:
    """Return the figures of one arm; those relative to the base only if the base was measured."""
    row: dict[str, Any] = {
        "start_seconds": None if result.start_seconds is None else round(result.start_seconds, 2),
        "evidence": {
            line["slot"]: f"{line['status']}: {line['proof']}"
            for line in result.ready.get("evidence", ())
            if line["proof"] != "baseline"
        },
        "failure": result.failure,
    }
    if not result.counted:
        return row
    milliseconds = spread([1000 * value for value in result.seconds], 3)
    work = arm.global_batch / batch
    row |= {
        "step_ms": milliseconds,
        "rounds_ms": [round(1000 * value, 3) for value in result.seconds],
        "tokens_per_second": round(result.ready["tokens_per_step"] / (milliseconds["median"] / 1000), 1),
        "wall_seconds": round(wall_seconds(result, steps), 2),
        "peak_bytes": result.peak_bytes,
        "peak_bytes_of_ranks": result.ready.get("peak_bytes_of_ranks", [result.peak_bytes]),
        **communication(result.ready["collectives"]),
        "last_loss": round(result.losses[-1], 5),
    }
    if not base.counted:
        return row
    return row | {
        **scaling(base.seconds, result.seconds, arm.ranks, work),
        "wall_speed_up": round(work * wall_seconds(base, steps) / wall_seconds(result, steps), 4),
        "loss_difference": mean_difference(result.losses, base.losses) if arm.kind in (BASE, STRONG) else None,
    }


def scaling(base: Sequence[float], arm: Sequence[float], ranks: int, work: float = 1.0) -> dict[str, Any]:
    """Return speed-up and efficiency from seconds per step of each round. `work` is the arm's global batch over the base's."""
    ratios = [work * one / other for one, other in zip(base, arm, strict=True)]
    return {"speed_up": spread(ratios), "efficiency": spread([ratio / ranks for ratio in ratios])}


def wall_seconds(result: Result, steps: int) -> float:
    """Return the seconds from the start of the processes to the last counted step, without the turns of other arms."""
    return (result.start_seconds or 0.0) + steps * sum(result.seconds)


def communication(profiled: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the shares of the step in collectives and in exposed ones, over all profiled steps of all ranks."""
    if not profiled:
        return {"in_collectives": None, "exposed": None}
    shares = {key: [one[key] / one["step"] for one in profiled] for key in ("collectives", "exposed")}
    return {"in_collectives": spread(shares["collectives"]), "exposed": spread(shares["exposed"])}
