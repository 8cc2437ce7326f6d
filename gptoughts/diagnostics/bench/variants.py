"""Make plans that differ from a given plan in one slot, and the jobs of their child processes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptoughts.api import ResolvedRun
from gptoughts.config.model_spec import spec_for
from gptoughts.diagnostics.bench.variant import Job
from gptoughts.errors import ConfigError, PlanError
from gptoughts.planning.environment import in_effect
from gptoughts.planning.layer import SLOTS
from gptoughts.planning.profile import pick
from gptoughts.planning.resolve import Plan, resolve

Layers = dict[str, Any]
"""Layers and their options as on the command line, one layer for every slot."""


@dataclass(frozen=True)
class RunRequest:
    """The arguments of `decide`, from which a child process resolves the same run again."""

    recipe: str | None
    profile: str
    fields: Mapping[str, str]
    plugins: Sequence[str] = ()


def layers_of(plan: Plan) -> Layers:
    """Return the command line layers and options of `plan`."""
    typed: Layers = {}
    for choice in plan.choices:
        typed[choice.slot] = choice.layer
        typed |= {f"{choice.slot}.{name}": value for name, value in choice.options.items()}
    return typed


def with_slot(layers: Layers, slot: str, other: Layers) -> Layers:
    """Return `layers` with the layer and options of `other` in `slot`."""
    kept = {key: value for key, value in layers.items() if key.partition(".")[0] != slot}
    return {**kept, **{key: value for key, value in other.items() if key.partition(".")[0] == slot}}


def baseline_of(setting: ResolvedRun) -> Layers:
    """Return the baseline layer of every slot."""
    catalog = setting.extensions.catalog.values()
    return {slot: next(layer.name for layer in catalog if layer.slot == slot and layer.baseline) for slot in SLOTS}


def plan_of(setting: ResolvedRun, ask: RunRequest, layers: Layers) -> Plan:
    """Resolve these layers as a fresh process would. Raises PlanError if they cannot be combined on this machine."""
    recipe, here = setting.resolved.recipe, setting.machine
    made = resolve(
        pick(ask.profile, here), here, spec_for(recipe), recipe, setting.world, setting.extensions.catalog, flags=layers,
        environment=dict(os.environ),
    )  # fmt: skip
    return in_effect(made, os.environ)


def why_not(error: PlanError) -> str:
    """Return the reasons of a PlanError in one line, without the suggested fixes."""
    lines = [
        line.strip().partition("    (")[0]
        for line in str(error).splitlines()[1:]
        if not line.strip().lower().startswith("try:")
    ]
    return "; ".join(" ".join(line.split()) for line in lines) or str(error)


def job_of(setting: ResolvedRun, ask: RunRequest, plan: Plan, least_warm: int = 2, weights_seed: int | None = None) -> Job:
    """Return the job that trains `plan`, with the warm-up steps that its layers require and at least `least_warm`."""
    if setting.world.world_size > 1:
        raise ConfigError("bench: runs in one process, not under torchrun")
    warm = max(setting.extensions.catalog[choice.layer].warmup_steps for choice in plan.choices)
    return Job(
        recipe=ask.recipe,
        profile=ask.profile,
        fields=dict(ask.fields),
        layers=layers_of(plan),
        digest=plan.digest(),
        plugins=tuple(ask.plugins),
        warmup_steps=max(least_warm, 1 + warm),
        weights_seed=weights_seed,
        environment=dict(plan.environment),
    )
