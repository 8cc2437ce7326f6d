"""Compare the loss of a plan with its reference: same data and seed, plus the noise of other initial weights.

Pass: the final smoothed losses differ by at most the larger of 0.5 % and twice the standard deviation over seeds. Tokens and seconds to an
equal loss are reported as well, because speed alone says little about a layer that changes arithmetic.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gptoughts.api import ResolvedRun
from gptoughts.diagnostics.bench.children import Result, Say, Turns, measure
from gptoughts.diagnostics.bench.curves import first_below, mean_difference, smoothed, window_of
from gptoughts.diagnostics.bench.figures import machine_figures
from gptoughts.diagnostics.bench.gains import PLAN
from gptoughts.diagnostics.bench.variants import Layers, RunRequest, baseline_of, job_of, layers_of, plan_of, why_not, with_slot
from gptoughts.errors import ConfigError, LayerError, PlanError, nearest
from gptoughts.planning.layer import SLOTS
from gptoughts.planning.resolve import Plan

REFERENCE = "reference"
LEAST_LIMIT = 0.005
"""Minimum limit as a share of the loss; its source is in docs/bench.md."""
ROUNDS = 10
"""Rounds of plan and reference, so that both see the same machine load."""

REFERENCES: dict[str, tuple[str, ...]] = {"precision": ("bf16", "fp32"), "optimizer": ("fused", "plain")}
"""Slots whose reference is not the baseline: candidates in order, the first that can run is used."""


def in_question(setting: ResolvedRun, named: Sequence[str] = ()) -> dict[str, str]:
    """Return slot -> layer to compare: the named slots, else precision and optimizer, else every slot, restricted to layers that change
    numerics and are no reference.

    Raises ConfigError for unknown slots, and if no layer remains.
    """
    catalog, layers = setting.extensions.catalog, setting.plan.layers
    wrong = [
        f"--slots: no slot {slot!r}{nearest(slot, SLOTS)}; slots: {', '.join(SLOTS)}" for slot in named if slot not in SLOTS
    ]
    if wrong:
        raise ConfigError("\n".join(wrong))
    if named:
        found = {slot: layers[slot] for slot in named if not catalog[layers[slot]].baseline}
    else:
        changing = {
            slot: layer
            for slot, layer in layers.items()
            if catalog[layer].changes_numerics and not catalog[layer].baseline and layer not in REFERENCES.get(slot, ())
        }
        found = {slot: layer for slot, layer in changing.items() if slot in REFERENCES} or changing
    if not found:
        raise ConfigError(
            "bench parity: no layer of this plan changes numerics against its reference",
            fix="--layer.precision fp16, --layer.optimizer 8bit, or --slots precision (bf16 against fp32)",
        )
    return found


def reference_of(setting: ResolvedRun, ask: RunRequest, asked: Mapping[str, str]) -> Plan:
    """Return the plan with the reference in every compared slot. Raises PlanError with the reason per candidate."""
    layers, nothing = layers_of(setting.plan), baseline_of(setting)
    for slot, layer in asked.items():
        names = REFERENCES.get(slot, (nothing[slot],))
        names = names[names.index(layer) + 1 :] if layer in names else names
        layers = _first_that_runs(setting, ask, layers, slot, names)
    return plan_of(setting, ask, layers)


def _first_that_runs(setting: ResolvedRun, ask: RunRequest, layers: Layers, slot: str, names: Sequence[str]) -> Layers:
    refused = []
    for name in names:
        options = {f"{slot}.{option}": value.default for option, value in setting.extensions.catalog[name].options.items()}
        made = with_slot(layers, slot, {slot: name, **options})
        try:
            plan_of(setting, ask, made)
        except PlanError as error:
            refused.append(f"{name}: {why_not(error)}")
        else:
            return made
    raise PlanError(f"{slot}={layers[slot]}: no reference can run on this machine\n  " + "\n  ".join(refused))


def bench_parity(
    setting: ResolvedRun, ask: RunRequest, *, steps: int, seeds: int, named: Sequence[str], command: str, say: Say = lambda text: None,
    turns: Turns | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return the figures as plain data, `passed` among them. Raises LayerError if a training could not be measured."""
    asked = in_question(setting, named)
    plan, reference = plan_of(setting, ask, layers_of(setting.plan)), reference_of(setting, ask, asked)
    drawn = _other_seeds(setting, seeds)
    warm = max(job_of(setting, ask, one).warmup_steps for one in (plan, reference))
    rounds = min(ROUNDS, steps)
    per_round = max(1, math.ceil((steps - warm - 1) / rounds))
    ends = {PLAN: job_of(setting, ask, plan, warm), REFERENCE: job_of(setting, ask, reference, warm)}
    load = [round(os.getloadavg()[0], 2)]
    results, how = measure(ends, rounds, per_round, say, turns=turns, otherwise=Turns.IN_A_ROW)
    others = {_named(seed): job_of(setting, ask, reference, warm, seed) for seed in drawn}
    results |= measure(others, 1, rounds * per_round, say, turns=Turns.IN_A_ROW)[0]  # not timed: no interleaving
    load.append(round(os.getloadavg()[0], 2))
    _demand(results)
    curves = {name: one.losses[:steps] for name, one in results.items()}
    head = results[PLAN].ready
    return {
        "what": "bench parity",
        "command": command,
        "machine": machine_figures(setting.machine, head["threads"]),
        "load_averages": load,
        "recipe": setting.resolved.recipe.name,
        "model": head["model"],
        "tokens_per_step": head["tokens_per_step"],
        "profile": setting.plan.profile,
        "plan": plan.layers,
        "in_question": asked,
        "reference": {slot: reference.layers[slot] for slot in asked},
        "steps": len(curves[PLAN]),
        "seeds": [setting.resolved.recipe.seed, *drawn],
        "processes": str(how),
        "evidence": {line["slot"]: line["proof"] for line in head["evidence"] if line["slot"] in asked},
        **verdict(curves),
        **_race(results, curves, head["tokens_per_step"]),
        "losses": {name: [_finite(value) for value in curve] for name, curve in curves.items()},
    }


def _named(seed: int) -> str:
    return f"reference, weights of seed {seed}"


def _other_seeds(setting: ResolvedRun, count: int) -> list[int]:
    """Return seeds for other initial weights; none if all weights are read from a file."""
    recipe = setting.resolved.recipe
    if recipe.model.path and recipe.adapter.kind == "none":
        return []
    return [recipe.seed + number for number in range(1, count + 1)]


def _demand(results: Mapping[str, Result]) -> None:
    """Raise LayerError for trainings that failed. A diverged plan counts as measured: it does not pass."""
    failed = [
        f"  {name}: {one.failure or 'no steps'}"
        for name, one in results.items()
        if not one.counted and not (name == PLAN and one.diverged)
    ]
    if failed:
        raise LayerError("bench parity: a training could not be measured\n" + "\n".join(failed))


def verdict(curves: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return final difference, seed noise, limit, and whether the plan passes. A loss that is not finite does not pass."""
    window = window_of(len(curves[REFERENCE]))
    finals = {name: smoothed(curve, window)[-1] for name, curve in curves.items()}
    reference = finals[REFERENCE]
    difference = (finals[PLAN] - reference) / reference
    seeds = [value for name, value in finals.items() if name != PLAN]
    noise = statistics.stdev(seeds) / reference if len(seeds) > 1 and all(map(math.isfinite, seeds)) else None
    limit = max(LEAST_LIMIT, 2 * noise) if noise is not None else LEAST_LIMIT
    return {
        "window": window,
        "final_losses": {name: _finite(value) for name, value in finals.items()},
        "difference": difference if math.isfinite(difference) else None,
        "mean_difference": mean_difference(curves[PLAN], curves[REFERENCE]),
        "seed_noise": noise,
        "limit": limit,
        "passed": math.isfinite(difference) and abs(difference) <= limit,
    }


def _finite(value: float) -> float | None:
    """Return the value rounded; None if not finite, which JSON cannot hold."""
    return round(value, 5) if math.isfinite(value) else None


def _race(results: Mapping[str, Result], losses: Mapping[str, Sequence[float]], tokens_per_step: int) -> dict[str, Any]:
    """Return tokens and seconds until each reaches the higher of the two final losses, at its median seconds per step."""
    curves = {name: smoothed(losses[name], window_of(len(losses[name]))) for name in (PLAN, REFERENCE)}
    level = max(curve[-1] for curve in curves.values())
    race: dict[str, Any] = {}
    for name, curve in curves.items():
        steps = first_below(curve, level)
        seconds = statistics.median(results[name].seconds or [math.nan])
        race[name] = {
            "step_seconds": round(seconds, 6) if results[name].seconds else None,
            "steps": steps,
            "tokens": None if steps is None else steps * tokens_per_step,
            "seconds": None if steps is None else round(steps * seconds, 6),
            "first_step_seconds": round(results[name].ready["first_step_seconds"], 2),
        }
    return {"equal_loss": level if math.isfinite(level) else None, "to_equal_loss": race}
