"""What is asked for: a profile's lists of layers with the command line laid over, every name and option checked, all problems at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gptoughts.errors import ConfigError, listed, nearest
from gptoughts.planning.layer import SLOTS, Layer
from gptoughts.planning.profile import LayerRequest, Profile

Catalog = Mapping[str, Layer]


def wanted(profile: Profile, catalog: Catalog, flags: Mapping[str, Any]) -> dict[str, tuple[LayerRequest, ...]]:
    """For every slot the layers to try, in order, with their options complete and typed.

    `flags` are slots and options as on the command line: `{"attention": "sdpa", "microbatch.sequences": "4"}`. A layer named there is
    demanded. An option given there demands a layer that takes it: one that the profile lists, else one of the catalog.
    Raises ConfigError with every slot, layer and option that does not exist and every value that cannot be read.
    """
    problems: list[str] = []
    named, given = _split(flags, problems)
    for slot in profile.slots:
        if slot not in SLOTS:
            problems.append(f"{profile.path}: slots.{slot}: {_no_slot(slot)}")
    wants = {}
    for slot in SLOTS:
        offered = _listed(profile, slot, catalog, problems)
        rows = offered if slot not in named else _named(slot, named[slot], offered, catalog, problems)
        if slot in given:
            rows = _takers(slot, given[slot], rows, slot in named, catalog, problems)
        wants[slot] = tuple(_typed(want, slot, given.get(slot, {}), catalog, problems) for want in rows)
    if problems:
        raise listed("layers", dict.fromkeys(problems))
    return wants


def _no_slot(slot: str) -> str:
    return f"no such slot{nearest(slot, SLOTS)}; slots: {', '.join(SLOTS)}"


def _flag(slot: str, option: str = "") -> str:
    return f"--layer.{slot}{f'.{option}' if option else ''}".replace("_", "-")


def _split(flags: Mapping[str, Any], problems: list[str]) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Layers by slot, and options by slot."""
    named: dict[str, str] = {}
    given: dict[str, dict[str, Any]] = {}
    for key, value in flags.items():
        slot, _, option = key.replace("-", "_").partition(".")
        if slot not in SLOTS:
            problems.append(f"--layer.{key}: {_no_slot(slot)}")
        elif option:
            given.setdefault(slot, {})[option] = value
        else:
            named[slot] = str(value)
    return named, given


def _listed(profile: Profile, slot: str, catalog: Catalog, problems: list[str]) -> list[LayerRequest]:
    """What the profile lists, or the slot's baseline; unknown layers go to `problems`."""
    if slot not in profile.slots:
        return [LayerRequest(layer.name, {}, "baseline") for layer in _of(slot, catalog) if layer.baseline][:1]
    known = []
    for want in profile.slots[slot]:
        why = _not_here(slot, want.layer, catalog)
        if why:
            problems.append(f"{want.origin}: slots.{slot}: {why}")
        else:
            known.append(want)
    return known


def _named(slot: str, layer: str, offered: list[LayerRequest], catalog: Catalog, problems: list[str]) -> list[LayerRequest]:
    """The layer that the command line names, with the options that the profile gives it."""
    why = _not_here(slot, layer, catalog)
    if why:
        problems.append(f"{_flag(slot)}: {why}")
        return []
    options = next((want.options for want in offered if want.layer == layer), {})
    return [LayerRequest(layer, options, _flag(slot), demanded=True)]


def _of(slot: str, catalog: Catalog) -> list[Layer]:
    return [layer for layer in catalog.values() if layer.slot == slot]


def _not_here(slot: str, layer: str, catalog: Catalog) -> str:
    fitting = [one.name for one in _of(slot, catalog)]
    if layer in fitting:
        return ""
    renamed = [one.name for one in _of(slot, catalog) if layer in one.former_names]
    close = f" (did you mean {renamed[0]!r}?)" if renamed else nearest(layer, fitting)
    elsewhere = f"; {layer} belongs to slot {catalog[layer].slot}" if layer in catalog else close
    return f"no layer {layer!r} for this slot{elsewhere}; layers: {', '.join(fitting)}"


def _takers(
    slot: str, given: Mapping[str, Any], rows: list[LayerRequest], named: bool, catalog: Catalog, problems: list[str]
) -> list[LayerRequest]:
    """The layers that take every given option; an option that nobody takes would otherwise be lost without a word."""
    origin = " ".join(_flag(slot, option) for option in given)

    def takes(layer: str) -> bool:
        return set(given) <= set(catalog[layer].options)

    def suits(layer: str) -> bool:
        """Two layers may call by one name what they choose from different lists."""
        options = catalog[layer].options
        return takes(layer) and all(
            not options[name].choices or value in options[name].choices for name, value in given.items()
        )

    takers = [replace(want, origin=origin, demanded=True) for want in rows if takes(want.layer)]
    if not takers and not named:
        takers = [LayerRequest(layer.name, {}, origin, demanded=True) for layer in _of(slot, catalog) if takes(layer.name)]
    takers = [want for want in takers if suits(want.layer)] or takers
    if not takers:
        asked = [catalog[want.layer] for want in rows] if named else _of(slot, catalog)
        known = sorted({option for layer in asked for option in layer.options})
        for option in given:
            if option not in known or len(given) > 1:
                hint = f"{nearest(option, known)}; options: {', '.join(known) or 'none'}"
                problems.append(f"{_flag(slot, option)}: {', '.join(layer.name for layer in asked)}: no such option{hint}")
    return takers


def _typed(want: LayerRequest, slot: str, given: Mapping[str, Any], catalog: Catalog, problems: list[str]) -> LayerRequest:
    """The want with all its options, read as their types; those of the command line last."""
    layer = catalog[want.layer]
    written = {name: value for name, value in want.options.items() if name not in given}
    options: dict[str, Any] = {}
    try:
        options = layer.read_options(written, f"{want.origin}: slots.{slot}: {want.layer}")
    except ConfigError as error:
        problems += str(error).splitlines()
    for name, value in given.items():
        try:
            options[name] = layer.options[name].read(value, _flag(slot, name))
        except ConfigError as error:
            problems.append(str(error))
    return replace(want, options=options)
