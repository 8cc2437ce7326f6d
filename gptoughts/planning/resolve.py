"""The plan: a profile met with a machine, a model, a recipe and a number of ranks. Pure: no torch, no probing, no guessing.

`resolve` answers which layer every slot gets and why the others were passed over. The same call makes the plan of a box that is not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from gptoughts.config.loader import Recipe
from gptoughts.config.model_spec import ModelSpec
from gptoughts.errors import ConfigError, PlanError
from gptoughts.hardware.machine import Machine, World
from gptoughts.planning.layer import SLOTS, Case, Choice, Kind, Layer, Reason, unsupported
from gptoughts.planning.memory_fit import Choices, fit
from gptoughts.planning.memory_model import baseline
from gptoughts.planning.plan import Plan, ranks_in_words
from gptoughts.planning.profile import LayerRequest, Profile, pick
from gptoughts.planning.requests import Catalog, wanted

__all__ = ["Plan", "resolve"]


def resolve(
    profile: Profile,
    machine: Machine,
    spec: ModelSpec,
    recipe: Recipe,
    world: World,
    catalog: Catalog,
    flags: Mapping[str, Any] | None = None,
    fixed_environment: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Plan:
    """The plan of `profile` for this machine, model, recipe and world.

    `fixed_environment` is given where torch is loaded already: a layer that needs other variables than those is unmet.
    `environment` holds the variables of a process on this machine, for layers that must respect what the user set.

    Slots in order take the first layer that pays, or of demanded ones the first that can run; then clashes and needs over the whole plan
    strike one layer at a time, in the later slot, or in the earlier where the later has no other.
    Raises PlanError with every slot that has no layer left, ConfigError for layers or options that do not exist.
    """
    wants = wanted(profile, catalog, flags or {})
    case = Case(
        machine,
        spec,
        recipe,
        world,
        environment=environment or {},
        micro_batch=wants["microbatch"][0].options,
        wishes={slot: rows[0].layer for slot, rows in wants.items()},
        compiles=catalog[wants["compile"][0].layer].compiles,
    )
    _one_gpu_per_rank(case)
    struck: dict[tuple[str, str], Reason] = {}
    while True:
        tried = _try(wants, case, catalog, struck, fixed_environment)
        if tried.empty:
            raise _plan_error(profile, case, tried.empty, catalog, flags or {})
        strike = _first_strike(tried, catalog)
        if strike is None:
            return _finish(profile, case, tried.choices, catalog)
        slot, reason = strike
        struck[slot, tried.choices[slot].layer] = reason


def _repeats(layer: Layer, case: Case) -> bool:
    return layer.repeatable and (layer.repeatable_on_gpu or not case.on_gpu)


def _one_gpu_per_rank(case: Case) -> None:
    gpus, ranks = len(case.machine.gpus), case.world.local_world_size
    if gpus and ranks > gpus:
        raise PlanError(
            f"{ranks} ranks on {case.machine.label()}: every rank needs a GPU of its own\n  try: torchrun --nproc-per-node {gpus}"
        )


@dataclass
class _Try:
    """One pass over the slots."""

    choices: dict[str, Choice] = field(default_factory=dict)
    empty: dict[str, list[tuple[LayerRequest, list[Reason]]]] = field(default_factory=dict)
    standing: dict[str, list[str]] = field(default_factory=dict)
    """Per slot the layers that might be chosen."""


def _try(
    wants: Mapping[str, tuple[LayerRequest, ...]],
    case: Case,
    catalog: Catalog,
    struck: Mapping[tuple[str, str], Reason],
    fixed_environment: Mapping[str, str] | None,
) -> _Try:
    tried, first = _Try(), wants["microbatch"][0]
    budget = baseline(case.spec, case.recipe, case.rank_sequences)
    budget = catalog[first.layer].memory(case, first.options, budget) if budget else None
    for slot in SLOTS:
        here = replace(case, chosen=dict(tried.choices), budget=budget)
        judged = []
        for want in wants[slot]:
            reasons = (
                [struck[slot, want.layer]]
                if (slot, want.layer) in struck
                else catalog[want.layer].rejections(here, want.options)
            )
            if fixed_environment is not None and not any(reason.kind is Kind.UNSUPPORTED for reason in reasons):
                reasons += _too_late(catalog[want.layer].environment(here, want.options), fixed_environment)
            judged.append((want, reasons))
        paying = [row for row in judged if not row[1]]
        able = [row for row in judged if row[0].demanded and all(reason.kind is not Kind.UNSUPPORTED for reason in row[1])]
        tried.standing[slot] = [want.layer for want, reasons in judged if (want, reasons) in paying + able]
        if not paying + able:
            tried.empty[slot] = judged
            continue
        want, reasons = (paying or able)[0]
        before = judged[: judged.index((want, reasons))]
        over = tuple((other.layer, tuple(why)) for other, why in before)
        dtype = catalog[want.layer].compute_dtype
        tried.choices[slot] = Choice(slot, want.layer, dict(want.options), want.origin, over, tuple(reasons), dtype)
        budget = catalog[want.layer].memory(here, want.options, budget) if budget else None
    return tried


def _too_late(needed: Mapping[str, str], there: Mapping[str, str]) -> Iterator[Reason]:
    """Variables that only count before torch is loaded, where it is loaded already."""
    for name, value in needed.items():
        if there.get(name) != value:
            yield unsupported(
                f"needs {name}={value} before torch is imported", remedy=f"export {name}={value} and start Python again"
            )


def _first_strike(tried: _Try, catalog: Catalog) -> tuple[str, Reason] | None:
    """The slot whose layer must go, and why; None where all layers can stand together."""
    picked = [catalog[tried.choices[slot].layer] for slot in SLOTS]
    for first, second in combinations(picked, 2):
        why = _conflict(first, second)
        if why:
            return _weaker(first.slot, second.slot, tried), unsupported(why)
    for layer in picked:
        for slot, allowed in layer.needs_slots.items():
            other = tried.choices[slot].layer
            if other in allowed:
                continue
            earlier, later = sorted((layer.slot, slot), key=SLOTS.index)
            helps = any(name in allowed for name in tried.standing[slot])
            why = f"{layer.name} needs {slot} = {' or '.join(allowed)}, chosen was {other}"
            return _weaker(earlier, later, tried) if helps else layer.slot, unsupported(why)
    return None


def _conflict(first: Layer, second: Layer) -> str:
    said = first.clashes.get(second.name) or second.clashes.get(first.name)
    if said:
        return f"{first.name} and {second.name} clash: {said}"
    both = sorted(set(first.replaces) & set(second.replaces))
    return f"{first.name} and {second.name} both replace {', '.join(both)}" if both else ""


def _weaker(earlier: str, later: str, tried: _Try) -> str:
    """The slot that gives way: the later one, or the earlier where that has another layer and the later has none."""
    return earlier if len(tried.standing[later]) == 1 and len(tried.standing[earlier]) > 1 else later


def _plan_error(
    profile: Profile,
    case: Case,
    empty: Mapping[str, list[tuple[LayerRequest, list[Reason]]]],
    catalog: Catalog,
    flags: Mapping[str, Any],
) -> PlanError:
    ranks = f", {ranks_in_words(case.world.world_size)}" if case.world.world_size > 1 else ""
    lines = [f"profile {profile.name} cannot run on {case.machine.label()}{ranks}"]
    width = max(len(slot) for slot in empty)
    for slot, judged in empty.items():
        for want, reasons in judged:
            lines.append(f"  {slot:<{width}}  {want.layer}: {'; '.join(map(str, reasons))}    ({want.origin})")
    return PlanError("\n".join([*lines, f"  try: {_way_out(profile, case, empty, catalog, flags)}"]))


def _way_out(
    profile: Profile,
    case: Case,
    empty: Mapping[str, list[tuple[LayerRequest, list[Reason]]]],
    catalog: Catalog,
    flags: Mapping[str, Any],
) -> str:
    """What would run instead: the same command without the flags that failed, or the profile that `auto` takes, or the remedies."""
    failed = [f"--layer.{key}".replace("_", "-") for key in flags if _slot(key) in empty]
    kept = {key: value for key, value in flags.items() if _slot(key) not in empty}
    try:
        auto = pick("auto", case.machine)
        plan = (
            None
            if auto.path == profile.path and not failed
            else resolve(auto, case.machine, case.spec, case.recipe, case.world, catalog, kept)
        )
    except (PlanError, ConfigError):
        plan = None
    if plan is None:
        # A layer that was refused here is no way out for the others of its slot.
        refused = {f"--layer.{slot.replace('_', '-')} {want.layer}" for slot, judged in empty.items() for want, _ in judged}
        remedies = [reason.remedy for judged in empty.values() for _, why in judged for reason in why if reason.remedy]
        remedies = [remedy for remedy in remedies if remedy not in refused] or remedies
        return "; or ".join(dict.fromkeys(remedies)) or "another machine or recipe; no shipped profile runs this one here"
    taken = ", ".join(f"{slot}={plan.layers[slot]}" for slot in dict.fromkeys([*empty, "precision", "attention"]))
    if failed and auto.path == profile.path:
        return f"without {' and '.join(failed)}   (takes {taken})"
    without = f" without {' and '.join(failed)}" if failed else ""
    return f"--profile auto{without}   (takes {auto.name}: {taken})"


def _slot(flag: str) -> str:
    return flag.replace("-", "_").partition(".")[0]


def _finish(profile: Profile, case: Case, choices: Mapping[str, Choice], catalog: Catalog) -> Plan:
    environment: dict[str, str] = {}
    for choice in choices.values():
        environment |= catalog[choice.layer].environment(case, choice.options)

    def stands(other: Choices) -> bool:
        layers = [catalog[choice.layer] for choice in other.values()]
        apart = any(_conflict(first, second) for first, second in combinations(layers, 2))
        needs = all(other[slot].layer in allowed for layer in layers for slot, allowed in layer.needs_slots.items())
        return needs and not apart

    notes, gpus, used = list(case.machine.notes), len(case.machine.gpus), case.world.local_world_size
    if not profile.match.holds(case.machine):
        how = "; to train on the CPU: CUDA_VISIBLE_DEVICES= gptoughts train ..." if profile.match.gpu is False else ""
        notes.append(f"profile {profile.name} was made for other hardware: its [match] does not hold here{how}")
    if gpus > used:
        everyone = f"torchrun --standalone --nproc-per-node {gpus} -m gptoughts -- train ..."
        notes.append(f"{used} of {gpus} GPUs used; for all: {everyone}")
    return Plan(
        profile=profile.name,
        machine=case.machine.label(),
        world_size=case.world.world_size,
        choices=tuple(choices[slot] for slot in SLOTS),
        environment=environment,
        notes=tuple(notes),
        not_repeatable=tuple(choice.layer for choice in choices.values() if not _repeats(catalog[choice.layer], case)),
        memory=fit(case, choices, catalog, stands),
        spec={key: value for key, value in vars(case.spec).items() if value is not None},
    )
