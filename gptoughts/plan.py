"""The plan: a profile met with a machine, a model, a recipe and a number of ranks. Pure: no torch, no probing, no guessing.

`resolve` answers which layer every slot gets and why the others were passed over. The same call makes the plan of a box that is not here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptoughts.config import DataConfig, Recipe
from gptoughts.errors import ConfigError, PlanError, nearest
from gptoughts.facts import ModelFacts
from gptoughts.facts import of as facts_of
from gptoughts.layer import SLOTS, Case, Choice, Kind, Layer, Reason, cannot
from gptoughts.machine import Machine, World
from gptoughts.profile import Profile, Want, pick

Catalog = Mapping[str, Layer]

RANK_LOCAL = "GPTOUGHTS_"
"""Variables that differ from rank to rank, such as the NUMA node, start with this and are no part of the digest."""


@dataclass(frozen=True)
class Plan:
    """What will run: one layer per slot, the environment it needs, and the reasons."""

    profile: str
    machine: str
    world_size: int
    choices: tuple[Choice, ...]
    environment: Mapping[str, str]
    notes: tuple[str, ...] = ()
    not_repeatable: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def choice(self, slot: str) -> Choice:
        """The choice of one slot."""
        return self.choices[SLOTS.index(slot)]

    @property
    def layers(self) -> dict[str, str]:
        """Slot -> layer."""
        return {choice.slot: choice.layer for choice in self.choices}

    def digest(self) -> str:
        """A hash of what ranks and a resumed run must share: layers, options, environment; nothing that is one rank's own."""
        shared = {
            "layers": {choice.slot: [choice.layer, dict(choice.options)] for choice in self.choices},
            "environment": {name: value for name, value in self.environment.items() if not name.startswith(RANK_LOCAL)},
            "world_size": self.world_size,
        }
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, with every reason."""
        return {
            "profile": self.profile,
            "machine": self.machine,
            "world_size": self.world_size,
            "digest": self.digest(),
            "choices": [_choice_json(choice) for choice in self.choices],
            "environment": dict(self.environment),
            "notes": list(self.notes),
            "not_repeatable": list(self.not_repeatable),
            "model": dict(self.facts),
        }

    def table(self) -> str:
        """The plan as a person reads it: slot, layer, and every reason."""
        width = max(len(slot) for slot in SLOTS)
        wide = max(len(_titled(choice)) for choice in self.choices)
        lines = [f"profile {self.profile} on {self.machine}, {_ranks(self.world_size)}"]
        for choice in self.choices:
            reasons = [f"not {layer}: {'; '.join(map(str, why))}" for layer, why in choice.passed_over]
            reasons += [f"expect a loss: {reason}" for reason in choice.expected_loss]
            first, *rest = reasons or [""]
            lines.append(f"{choice.slot:<{width}}  {_titled(choice):<{wide}}  {first}".rstrip())
            lines += [f"{'':<{width}}  {'':<{wide}}  {reason}" for reason in rest]
        lines += [f"environment  {name}={value}" for name, value in self.environment.items()]
        if self.not_repeatable:
            lines.append(f"not bit for bit after a resume: {', '.join(self.not_repeatable)}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _ranks(world_size: int) -> str:
    return "1 process" if world_size == 1 else f"{world_size} ranks"


def _titled(choice: Choice) -> str:
    options = ", ".join(f"{name}={value}" for name, value in choice.options.items() if value is not None)
    return f"{choice.layer} ({options})" if options else choice.layer


def _choice_json(choice: Choice) -> dict[str, Any]:
    return {
        "slot": choice.slot,
        "layer": choice.layer,
        "options": dict(choice.options),
        "origin": choice.origin,
        "passed_over": [
            {"layer": layer, "reasons": [{"kind": str(why.kind), "text": str(why)} for why in reasons]}
            for layer, reasons in choice.passed_over
        ],
        "expected_loss": [str(reason) for reason in choice.expected_loss],
    }


def overrides(flags: Mapping[str, Any], catalog: Catalog) -> tuple[dict[str, Want], dict[str, dict[str, Any]]]:
    """`{"attention": "sdpa", "microbatch.sequences": "4"}` as layers demanded by name and options by slot. Raises ConfigError."""
    wants: dict[str, Want] = {}
    options: dict[str, dict[str, Any]] = {}
    for key, value in flags.items():
        slot, _, option = key.partition(".")
        if slot not in SLOTS:
            raise ConfigError(f"--layer.{key}: no slot {slot!r}{nearest(slot, SLOTS)}; slots: {', '.join(SLOTS)}")
        if option:
            options.setdefault(slot, {})[option] = value
            continue
        fitting = [layer.name for layer in catalog.values() if layer.slot == slot]
        if value not in fitting:
            elsewhere = f"; {value} belongs to slot {catalog[value].slot}" if value in catalog else nearest(str(value), fitting)
            raise ConfigError(f"--layer.{slot}: no layer {value!r} for this slot{elsewhere}; layers: {', '.join(fitting)}")
        wants[slot] = Want(str(value), {}, f"--layer.{slot}", demanded=True)
    return wants, options


def facts_for(recipe: Recipe) -> ModelFacts:
    """What the recipe alone tells of its model; sizes that follow from a text not read yet are None."""
    model, data = recipe.model, recipe.data
    if model.family == "gpt":
        return facts_of(model, data.sequence_length, vocabulary_of(data))
    return ModelFacts(family=model.family, depth=model.depth, width=model.width, sequence_length=data.sequence_length)


def vocabulary_of(data: DataConfig) -> int | None:
    """Tokens of the recipe's tokenizer where they can be told without reading the text."""
    index = Path(data.path).expanduser() / "index.json"
    if index.is_file():
        try:
            size = json.loads(index.read_text(encoding="utf-8")).get("vocab_size")
        except (ValueError, AttributeError):
            return None  # whoever opens the folder says what is wrong with it
        return size if isinstance(size, int) else None
    return {"bytes": 257, "gpt2": 50257, "bpe": data.train_bpe}.get(data.tokenizer)


def resolve(
    profile: Profile,
    machine: Machine,
    facts: ModelFacts,
    recipe: Recipe,
    world: World,
    catalog: Catalog,
    flags: Mapping[str, Any] | None = None,
    fixed_environment: Mapping[str, str] | None = None,
) -> Plan:
    """The plan of `profile` for this machine, model, recipe and world.

    `fixed_environment` is given where torch is loaded already: a layer that needs other variables than those is unmet.

    Slots in order take their first layer without unmet needs; then clashes and needs over the whole plan strike one layer at a time.
    Raises PlanError with every slot that has no layer left, ConfigError for a layer or option that does not exist.
    """
    demanded, options = overrides(flags or {}, catalog)
    wants = _wanted(profile, catalog, demanded, options)
    case = Case(machine, facts, recipe, world)
    struck: dict[tuple[str, str], Reason] = {}
    while True:
        choices, empty = _choose(wants, case, catalog, struck, fixed_environment)
        if empty:
            raise _plan_error(profile, case, empty, catalog, flags)
        strike = _first_violation(choices, catalog, wants, struck)
        if strike is None:
            break
        slot, layer, reason = strike
        struck[slot, layer] = reason
    return _finish(profile, case, choices, catalog)


def _wanted(
    profile: Profile, catalog: Catalog, demanded: Mapping[str, Want], options: Mapping[str, dict[str, Any]]
) -> dict[str, tuple[Want, ...]]:
    baselines = {layer.slot: layer.name for layer in catalog.values() if layer.baseline}
    for slot in profile.slots:
        if slot not in SLOTS:
            raise ConfigError(f"{profile.path}: slots.{slot}: no such slot{nearest(slot, SLOTS)}; slots: {', '.join(SLOTS)}")
    wants = {}
    for slot in SLOTS:
        listed = profile.slots.get(slot, (Want(baselines[slot], {}, "baseline"),))
        rows = (demanded[slot],) if slot in demanded else listed
        read = []
        for want in rows:
            if want.layer not in catalog or catalog[want.layer].slot != slot:
                fitting = [layer.name for layer in catalog.values() if layer.slot == slot]
                raise ConfigError(
                    f"{want.origin}: slots.{slot}: no layer {want.layer!r}{nearest(want.layer, fitting)}; layers: {', '.join(fitting)}"
                )
            layer = catalog[want.layer]
            typed = layer.read_options({**_same_layer_options(listed, want), **want.options}, f"{want.origin}: {want.layer}")
            for name, value in options.get(slot, {}).items():
                if name in layer.options:
                    typed[name] = layer.options[name].read(value, f"--layer.{slot}.{name}")
            read.append(Want(want.layer, typed, want.origin, want.demanded))
        _options_are_taken(slot, options.get(slot, {}), read, catalog)
        wants[slot] = tuple(read)
    return wants


def _same_layer_options(listed: tuple[Want, ...], want: Want) -> Mapping[str, Any]:
    """A layer named on the command line keeps the options that the profile gives it."""
    return next((other.options for other in listed if other.layer == want.layer), {})


def _options_are_taken(slot: str, given: Mapping[str, Any], wants: list[Want], catalog: Catalog) -> None:
    for name in given:
        if not any(name in catalog[want.layer].options for want in wants):
            layers = ", ".join(want.layer for want in wants)
            known = sorted({option for want in wants for option in catalog[want.layer].options})
            raise ConfigError(
                f"--layer.{slot}.{name}: {layers} takes no such option{nearest(name, known)}; options: {', '.join(known) or 'none'}"
            )


def _choose(
    wants: Mapping[str, tuple[Want, ...]],
    case: Case,
    catalog: Catalog,
    struck: Mapping[tuple[str, str], Reason],
    fixed_environment: Mapping[str, str] | None,
) -> tuple[dict[str, Choice], dict[str, list[tuple[Want, list[Reason]]]]]:
    choices: dict[str, Choice] = {}
    empty: dict[str, list[tuple[Want, list[Reason]]]] = {}
    for slot in SLOTS:
        here = Case(case.machine, case.facts, case.recipe, case.world, dict(choices))
        passed: list[tuple[Want, list[Reason]]] = []
        for want in wants[slot]:
            if (slot, want.layer) in struck:
                passed.append((want, [struck[slot, want.layer]]))
                continue
            reasons = catalog[want.layer].unmet(here, want.options)
            if fixed_environment is not None and not reasons:
                reasons = list(_too_late(catalog[want.layer].environment(here, want.options), fixed_environment))
            stopping = [reason for reason in reasons if reason.kind is Kind.CANNOT or not want.demanded]
            if stopping:
                passed.append((want, stopping))
                continue
            over = tuple((other.layer, tuple(why)) for other, why in passed)
            choices[slot] = Choice(slot, want.layer, dict(want.options), want.origin, over, tuple(reasons))
            break
        else:
            empty[slot] = passed
    return choices, empty


def _too_late(needed: Mapping[str, str], there: Mapping[str, str]) -> Iterator[Reason]:
    """Variables that only count before torch is loaded, where it is loaded already."""
    for name, value in needed.items():
        if there.get(name) != value:
            yield cannot(
                f"needs {name}={value} before torch is imported", remedy=f"export {name}={value} and start Python again"
            )


def _first_violation(
    choices: Mapping[str, Choice],
    catalog: Catalog,
    wants: Mapping[str, tuple[Want, ...]],
    struck: Mapping[tuple[str, str], Reason],
) -> tuple[str, str, Reason] | None:
    for earlier, later, why in _violations(choices, catalog):
        left = [want for want in wants[later] if (later, want.layer) not in struck]
        others = [want for want in wants[earlier] if (earlier, want.layer) not in struck]
        slot = earlier if len(left) == 1 and len(others) > 1 else later
        return slot, choices[slot].layer, cannot(why)
    return None


def _violations(choices: Mapping[str, Choice], catalog: Catalog) -> Iterator[tuple[str, str, str]]:
    """Pairs of slots whose layers cannot stand together (earlier slot, later slot, reason)."""
    picked = [catalog[choices[slot].layer] for slot in SLOTS]
    for index, first in enumerate(picked):
        for second in picked[index + 1 :]:
            said = first.clashes.get(second.name) or second.clashes.get(first.name)
            if said:
                yield first.slot, second.slot, f"{first.name} and {second.name} clash: {said}"
            both = sorted(set(first.replaces) & set(second.replaces))
            if both:
                yield first.slot, second.slot, f"{first.name} and {second.name} both replace {', '.join(both)}"
    for layer in picked:
        for slot, allowed in layer.needs_slots.items():
            if choices[slot].layer not in allowed:
                yield (
                    layer.slot,
                    layer.slot,
                    f"{layer.name} needs {slot} = {' or '.join(allowed)}, chosen was {choices[slot].layer}",
                )


def _plan_error(
    profile: Profile,
    case: Case,
    empty: Mapping[str, list[tuple[Want, list[Reason]]]],
    catalog: Catalog,
    flags: Mapping[str, Any] | None,
) -> PlanError:
    lines = [f"profile {profile.name} cannot run on {case.machine.label()}"]
    for slot, passed in empty.items():
        for want, reasons in passed:
            text = "; ".join(map(str, reasons))
            lines.append(f"  {slot:<10} {want.layer}: {text}    ({want.origin})")
    lines.append(f"  try: {_way_out(profile, case, empty, catalog, flags)}")
    return PlanError("\n".join(lines))


def _way_out(profile: Profile, case: Case, empty: Mapping[str, Any], catalog: Catalog, flags: Mapping[str, Any] | None) -> str:
    """What would run instead: the same command without the flags that failed, or the profile that `auto` takes."""
    failed = [f"--layer.{slot}" for slot in empty if slot in (flags or {})]
    kept = {key: value for key, value in (flags or {}).items() if key.split(".")[0] not in empty}
    try:
        auto = pick("auto", case.machine)
        plan = resolve(auto, case.machine, case.facts, case.recipe, case.world, catalog, kept)
    except PlanError:
        return "another machine; no shipped profile runs here"
    taken = ", ".join(f"{slot}={plan.layers[slot]}" for slot in dict.fromkeys([*empty, "precision", "attention"]))
    if failed and auto.name == profile.name:
        return f"without {' and '.join(failed)}   (takes {taken})"
    return f"--profile auto   (takes {auto.name}: {taken})"


def _finish(profile: Profile, case: Case, choices: Mapping[str, Choice], catalog: Catalog) -> Plan:
    environment: dict[str, str] = {}
    for choice in choices.values():
        environment |= catalog[choice.layer].environment(case, choice.options)
    unrepeatable = tuple(choice.layer for choice in choices.values() if not catalog[choice.layer].repeatable)
    notes = [*case.machine.notes]
    gpus = len(case.machine.gpus)
    if gpus > case.world.local_world_size:
        notes.append(
            f"{case.world.local_world_size} of {gpus} GPUs used; for all: torchrun --standalone --nproc-per-node {gpus} -m gptoughts train ..."
        )
    facts = {key: value for key, value in vars(case.facts).items() if value is not None}
    return Plan(
        profile.name,
        case.machine.label(),
        case.world.world_size,
        tuple(choices[slot] for slot in SLOTS),
        environment,
        tuple(notes),
        unrepeatable,
        facts,
    )
