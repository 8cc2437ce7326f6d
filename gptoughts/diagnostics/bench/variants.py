"""Plans that differ from a plan in one slot, made as the command line would make them, for processes that are yet to start."""

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
"""Slots and their options as on the command line, one layer for every slot."""


@dataclass(frozen=True)
class Ask:
    """The words that a setting was decided from; a process of its own decides it again from them."""

    recipe: str | None
    profile: str
    fields: Mapping[str, str]
    plugins: Sequence[str] = ()


def layers_of(plan: Plan) -> Layers:
    """What would have to be typed to get exactly the layers of `plan`."""
    typed: Layers = {}
    for choice in plan.choices:
        typed[choice.slot] = choice.layer
        typed |= {f"{choice.slot}.{name}": value for name, value in choice.options.items()}
    return typed


def with_slot(layers: Layers, slot: str, other: Layers) -> Layers:
    """`layers` with the layer that `other` has in `slot`, and its options."""
    kept = {key: value for key, value in layers.items() if key.partition(".")[0] != slot}
    return {**kept, **{key: value for key, value in other.items() if key.partition(".")[0] == slot}}


def baseline_of(setting: ResolvedRun) -> Layers:
    """The slots' baselines."""
    catalog = setting.extensions.catalog.values()
    return {slot: next(layer.name for layer in catalog if layer.slot == slot and layer.baseline) for slot in SLOTS}


def plan_of(setting: ResolvedRun, ask: Ask, layers: Layers) -> Plan:
    """The plan with these layers in a process that starts fresh. Raises PlanError where they cannot stand together here."""
    recipe, here = setting.resolved.recipe, setting.machine
    made = resolve(
        pick(ask.profile, here), here, spec_for(recipe), recipe, setting.world, setting.extensions.catalog, layers, None,
        dict(os.environ),
    )  # fmt: skip
    return in_effect(made, os.environ)


def why_not(error: PlanError) -> str:
    """The reasons of a PlanError in one line, without the ways out, which belong to whoever wrote the command."""
    lines = [line.strip().partition("    (")[0] for line in str(error).splitlines()[1:] if not line.strip().startswith("try:")]
    return "; ".join(" ".join(line.split()) for line in lines) or str(error)


def job_of(setting: ResolvedRun, ask: Ask, plan: Plan, least_warm: int = 2, weights_seed: int | None = None) -> Job:
    """The process that trains under `plan`, warm for as long as its layers ask and at least `least_warm` steps."""
    if setting.world.world_size > 1:
        raise ConfigError("bench compares single processes; start it without torchrun")
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
