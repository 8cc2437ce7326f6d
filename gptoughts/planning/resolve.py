"""Resolve profile, machine, model, recipe and number of ranks to a plan. Pure: no torch, no probing.

`resolve` chooses the layer of every slot and collects the reasons against the others. The machine can be any machine file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from gptoughts.config.loader import Recipe
from gptoughts.config.model_spec import ModelSpec
from gptoughts.errors import ConfigError, PlanError
from gptoughts.hardware.machine import Machine
from gptoughts.hardware.world import SRUN, World
from gptoughts.planning.layer import SLOTS, Case, Choice, Kind, Layer, Reason, unsupported
from gptoughts.planning.memory_fit import Choices, fit
from gptoughts.planning.memory_model import Budget, baseline
from gptoughts.planning.plan import Plan, ranks_in_words
from gptoughts.planning.profile import LayerRequest, Profile, pick
from gptoughts.planning.requests import Catalog, layer_requests

__all__ = ["Plan", "resolve"]


def resolve(
    profile: Profile,
    machine: Machine,
    spec: ModelSpec,
    recipe: Recipe,
    world: World,
    catalog: Catalog,
    *,
    flags: Mapping[str, Any] | None = None,
    fixed_environment: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Plan:
    """Return the plan of `profile` for this machine, model, recipe and world.

    `fixed_environment` is given if torch is imported already: a layer that needs other variables than these is rejected.
    `environment` holds the variables of a process on this machine, for layers that must respect those set by the user.

    Each slot in order takes its first layer without a reason against it; if there is none, the first demanded one that can run. Then
    clashes and `needs_slots` of the whole plan rule out one layer at a time, in the later slot, or in the earlier one if the later slot has
    no other layer.
    Raises PlanError with every slot that has no layer left, ConfigError for unknown layers or options.
    """
    requests = layer_requests(profile, catalog, flags or {})
    case = Case(
        machine,
        spec,
        recipe,
        world,
        environment=environment or {},
        micro_batch=requests["microbatch"][0].options,
        preferred={slot: rows[0].layer for slot, rows in requests.items()},
        compiles=catalog[requests["compile"][0].layer].compiles,
    )
    _one_gpu_per_rank(case)
    ruled_out: dict[tuple[str, str], Reason] = {}
    while True:
        found = _one_pass(requests, case, catalog, ruled_out, fixed_environment)
        if found.empty:
            raise _plan_error(profile, case, found.empty, catalog, flags or {})
        conflict = _first_conflict(found, catalog)
        if conflict is None:
            return _finish(profile, case, found.choices, catalog)
        slot, reason = conflict
        ruled_out[slot, found.choices[slot].layer] = reason


def _repeats(layer: Layer, case: Case) -> bool:
    return layer.repeatable and (layer.repeatable_on_gpu or not case.on_gpu)


def _one_gpu_per_rank(case: Case) -> None:
    gpus, ranks = len(case.machine.gpus), case.world.local_world_size
    if gpus and ranks > gpus and not case.world.own_gpus:
        fix = "srun --gpus-per-task=1" if case.world.launcher == SRUN.name else f"--gpus {gpus}"
        raise PlanError(f"{ranks} ranks on {case.machine.label()}: every rank needs its own GPU", fix=fix)


@dataclass
class _Pass:
    """Result of one pass over the slots."""

    choices: dict[str, Choice] = field(default_factory=dict)
    empty: dict[str, list[tuple[LayerRequest, list[Reason]]]] = field(default_factory=dict)
    possible: dict[str, list[str]] = field(default_factory=dict)
    """Slot -> layers that can be chosen."""


def _one_pass(
    requests: Mapping[str, tuple[LayerRequest, ...]],
    case: Case,
    catalog: Catalog,
    ruled_out: Mapping[tuple[str, str], Reason],
    fixed_environment: Mapping[str, str] | None,
) -> _Pass:
    found, first = _Pass(), requests["microbatch"][0]
    budget = baseline(case.spec, case.recipe, case.rank_sequences)
    replica = catalog[first.layer].memory(case, first.options, budget) if budget else None
    budget = _of_rank(requests["parallel"], replace(case, budget=replica), catalog) if replica else None
    for slot in SLOTS:
        # Earlier slots count on the strategy that is certain; the strategy itself is chosen by what a replica needs.
        here = replace(case, chosen=dict(found.choices), budget=replica if slot == "parallel" else budget)
        checked = []
        for request in requests[slot]:
            reasons = (
                [ruled_out[slot, request.layer]]
                if (slot, request.layer) in ruled_out
                else catalog[request.layer].rejections(here, request.options)
            )
            if fixed_environment is not None and not any(reason.kind is Kind.UNSUPPORTED for reason in reasons):
                reasons += _environment_too_late(catalog[request.layer].environment(here, request.options), fixed_environment)
            checked.append((request, reasons))
        accepted = [row for row in checked if not row[1]]
        runnable = [row for row in checked if row[0].required and all(reason.kind is not Kind.UNSUPPORTED for reason in row[1])]
        found.possible[slot] = [request.layer for request, reasons in checked if (request, reasons) in accepted + runnable]
        if not accepted + runnable:
            found.empty[slot] = checked
            continue
        request, reasons = (accepted or runnable)[0]
        before = checked[: checked.index((request, reasons))]
        over = tuple((other.layer, tuple(why)) for other, why in before)
        dtype = catalog[request.layer].compute_dtype
        found.choices[slot] = Choice(slot, request.layer, dict(request.options), request.origin, over, tuple(reasons), dtype)
        replica = catalog[request.layer].memory(here, request.options, replica) if replica else None
        after = SLOTS.index(slot) >= SLOTS.index("parallel")
        budget = (replica if after else catalog[request.layer].memory(here, request.options, budget)) if budget else None
    return found


def _of_rank(requests: tuple[LayerRequest, ...], case: Case, catalog: Catalog) -> Budget | None:
    """Return the memory of a rank before its layers are chosen: sharded if weights, gradients and optimizer state alone exceed it."""
    assert case.budget is not None
    states = replace(case, budget=replace(case.budget, tokens=0))
    for request in requests if case.world.world_size > 1 else ():
        layer = catalog[request.layer]
        if not layer.rejections(states, request.options):
            return layer.memory(case, request.options, case.budget)
    return case.budget


def _environment_too_late(needed: Mapping[str, str], there: Mapping[str, str]) -> Iterator[Reason]:
    """Yield reasons for variables that need to be set before torch is imported, if it is imported already."""
    for name, value in needed.items():
        if there.get(name) != value:
            yield unsupported(
                f"needs {name}={value} before torch is imported", remedy=f"export {name}={value} and start Python again"
            )


def _first_conflict(found: _Pass, catalog: Catalog) -> tuple[str, Reason] | None:
    """Return the slot whose layer is ruled out and the reason; None if all layers are compatible."""
    chosen = [catalog[found.choices[slot].layer] for slot in SLOTS]
    for first, second in combinations(chosen, 2):
        why = _conflict(first, second)
        if why:
            return _weaker(first.slot, second.slot, found), unsupported(why)
    for layer in chosen:
        for slot, allowed in layer.needs_slots.items():
            other = found.choices[slot].layer
            if other in allowed:
                continue
            earlier, later = sorted((layer.slot, slot), key=SLOTS.index)
            helps = any(name in allowed for name in found.possible[slot])
            why = f"{layer.name} needs {slot} = {' or '.join(allowed)}, not {other}"
            return _weaker(earlier, later, found) if helps else layer.slot, unsupported(why)
    return None


def _conflict(first: Layer, second: Layer) -> str:
    reason = first.clashes.get(second.name) or second.clashes.get(first.name)
    if reason:
        return f"{first.name} and {second.name} clash: {reason}"
    both = sorted(set(first.replaces) & set(second.replaces))
    return f"{first.name} and {second.name} both replace {', '.join(both)}" if both else ""


def _weaker(earlier: str, later: str, found: _Pass) -> str:
    """Return the slot to change: the later one, or the earlier one if only that has another layer."""
    return earlier if len(found.possible[later]) == 1 and len(found.possible[earlier]) > 1 else later


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
    for slot, checked in empty.items():
        for request, reasons in checked:
            lines.append(f"  {slot:<{width}}  {request.layer}: {'; '.join(map(str, reasons))}    ({request.origin})")
    return PlanError("\n".join(lines), fix=_fix(profile, case, empty, catalog, flags))


def _fix(
    profile: Profile,
    case: Case,
    empty: Mapping[str, list[tuple[LayerRequest, list[Reason]]]],
    catalog: Catalog,
    flags: Mapping[str, Any],
) -> str:
    """Return what would run: the same command without the failed flags, the profile that `auto` picks, or the remedies of the reasons."""
    failed = [f"--layer.{key}".replace("_", "-") for key in flags if _slot(key) in empty]
    kept = {key: value for key, value in flags.items() if _slot(key) not in empty}
    try:
        auto = pick("auto", case.machine)
        plan = (
            None
            if auto.path == profile.path and not failed
            else resolve(auto, case.machine, case.spec, case.recipe, case.world, catalog, flags=kept)
        )
    except (PlanError, ConfigError):
        plan = None
    if plan is None:
        # A layer rejected here cannot be the fix for the others of its slot.
        refused = {
            f"--layer.{slot.replace('_', '-')} {request.layer}" for slot, checked in empty.items() for request, _ in checked
        }
        remedies = [reason.remedy for checked in empty.values() for _, why in checked for reason in why if reason.remedy]
        remedies = [remedy for remedy in remedies if remedy not in refused] or remedies
        return (
            "; or ".join(dict.fromkeys(remedies))
            or "another machine or recipe; no shipped profile runs this recipe on this machine"
        )
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

    def compatible(other: Choices) -> bool:
        layers = [catalog[choice.layer] for choice in other.values()]
        clash = any(_conflict(first, second) for first, second in combinations(layers, 2))
        needs = all(other[slot].layer in allowed for layer in layers for slot, allowed in layer.needs_slots.items())
        return needs and not clash

    notes, gpus, used = list(case.machine.notes), len(case.machine.gpus), case.world.local_world_size
    used = 1 if used > gpus else used  # each rank sees its own GPUs
    if not profile.match.holds(case.machine):
        how = ". To train on the CPU: CUDA_VISIBLE_DEVICES= gptoughts train ..." if profile.match.gpu is False else ""
        notes.append(f"profile {profile.name} is for other hardware: its [match] does not apply to this machine{how}")
    if gpus > used:
        how = "srun --gpus-per-task=1" if case.world.own_gpus else f"gptoughts train ... --gpus {gpus}"
        notes.append(f"{used} of {gpus} GPUs used. To use all: {how}")
    return Plan(
        profile=profile.name,
        machine=case.machine.label(),
        world_size=case.world.world_size,
        choices=tuple(choices[slot] for slot in SLOTS),
        environment=environment,
        notes=tuple(notes),
        not_repeatable=tuple(choice.layer for choice in choices.values() if not _repeats(catalog[choice.layer], case)),
        memory=fit(case, choices, catalog, compatible),
        spec={key: value for key, value in vars(case.spec).items() if value is not None},
    )
