"""Layer requests: a profile's lists of layers overlaid with the command line. All invalid names and options go into one error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gptoughts.errors import ConfigError, listed, nearest
from gptoughts.planning.layer import SLOTS, Layer
from gptoughts.planning.profile import LayerRequest, Profile

Catalog = Mapping[str, Layer]


def layer_requests(profile: Profile, catalog: Catalog, flags: Mapping[str, Any]) -> dict[str, tuple[LayerRequest, ...]]:
    """Return the requests of every slot, in order of preference, with complete and typed options.

    `flags` are slots and options as on the command line: `{"attention": "sdpa", "microbatch.sequences": "4"}`. A layer named there is
    demanded. An option given there demands a layer that has it: one that the profile lists, otherwise one of the catalog.
    Raises ConfigError with every unknown slot, layer and option and every invalid value.
    """
    problems: list[str] = []
    named, given = _split(flags, problems)
    for slot in profile.slots:
        if slot not in SLOTS:
            problems.append(f"{profile.path}: slots.{slot}: {_no_slot(slot)}")
    requests = {}
    for slot in SLOTS:
        offered = _listed(profile, slot, catalog, problems)
        rows = offered if slot not in named else _named(slot, named[slot], offered, catalog, problems)
        if slot in given:
            rows = _with_options(slot, given[slot], rows, slot in named, catalog, problems)
        requests[slot] = tuple(_typed(request, slot, given.get(slot, {}), catalog, problems) for request in rows)
    if problems:
        raise listed("layers", dict.fromkeys(problems))
    return requests


def _no_slot(slot: str) -> str:
    return f"no such slot{nearest(slot, SLOTS)}. Slots: {', '.join(SLOTS)}"


def _flag(slot: str, option: str = "") -> str:
    return f"--layer.{slot}{f'.{option}' if option else ''}".replace("_", "-")


def _split(flags: Mapping[str, Any], problems: list[str]) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Split flags into layers by slot and options by slot."""
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
    """Return the layers that the profile lists, or the slot's baseline; append unknown layers to `problems`."""
    if slot not in profile.slots:
        return [LayerRequest(layer.name, {}, "baseline") for layer in _of(slot, catalog) if layer.baseline][:1]
    known = []
    for request in profile.slots[slot]:
        why = _not_in_slot(slot, request.layer, catalog)
        if why:
            problems.append(f"{request.origin}: slots.{slot}: {why}")
        else:
            known.append(request)
    return known


def _named(slot: str, layer: str, offered: list[LayerRequest], catalog: Catalog, problems: list[str]) -> list[LayerRequest]:
    """Return the layer named on the command line, with its options from the profile."""
    why = _not_in_slot(slot, layer, catalog)
    if why:
        problems.append(f"{_flag(slot)}: {why}")
        return []
    options = next((request.options for request in offered if request.layer == layer), {})
    return [LayerRequest(layer, options, _flag(slot), required=True)]


def _of(slot: str, catalog: Catalog) -> list[Layer]:
    return [layer for layer in catalog.values() if layer.slot == slot]


def _not_in_slot(slot: str, layer: str, catalog: Catalog) -> str:
    """Return the problem if `layer` is not a layer of `slot`, otherwise an empty string."""
    known = [one.name for one in _of(slot, catalog)]
    if layer in known:
        return ""
    renamed = [one.name for one in _of(slot, catalog) if layer in one.former_names]
    close = f" (did you mean {renamed[0]!r}?)" if renamed else nearest(layer, known)
    elsewhere = f"; {layer} belongs to slot {catalog[layer].slot}" if layer in catalog else close
    return f"no layer {layer!r} in this slot{elsewhere}. Layers: {', '.join(known)}"


def _with_options(
    slot: str, given: Mapping[str, Any], rows: list[LayerRequest], named: bool, catalog: Catalog, problems: list[str]
) -> list[LayerRequest]:
    """Return the layers that have every given option. An option without a layer is a problem, never ignored."""
    origin = " ".join(_flag(slot, option) for option in given)

    def has_options(layer: str) -> bool:
        return set(given) <= set(catalog[layer].options)

    def accepts(layer: str) -> bool:
        """Return whether the layer also accepts the values: layers can have an option of one name with different choices."""
        options = catalog[layer].options
        return has_options(layer) and all(
            not options[name].choices or value in options[name].choices for name, value in given.items()
        )

    found = [replace(request, origin=origin, required=True) for request in rows if has_options(request.layer)]
    if not found and not named:
        found = [LayerRequest(layer.name, {}, origin, required=True) for layer in _of(slot, catalog) if has_options(layer.name)]
    found = [request for request in found if accepts(request.layer)] or found
    if not found:
        asked = [catalog[request.layer] for request in rows] if named else _of(slot, catalog)
        known = sorted({option for layer in asked for option in layer.options})
        for option in given:
            if option not in known or len(given) > 1:
                hint = f"{nearest(option, known)}. Options: {', '.join(known) or 'none'}"
                problems.append(f"{_flag(slot, option)}: {', '.join(layer.name for layer in asked)}: no such option{hint}")
    return found


def _typed(request: LayerRequest, slot: str, given: Mapping[str, Any], catalog: Catalog, problems: list[str]) -> LayerRequest:
    """Return the request with all options parsed; those of the command line override the profile's."""
    layer = catalog[request.layer]
    written = {name: value for name, value in request.options.items() if name not in given}
    options: dict[str, Any] = {}
    try:
        options = layer.read_options(written, f"{request.origin}: slots.{slot}: {request.layer}")
    except ConfigError as error:
        problems += str(error).splitlines()
    for name, value in given.items():
        try:
            options[name] = layer.options[name].read(value, _flag(slot, name))
        except ConfigError as error:
            problems.append(str(error))
    return replace(request, options=options)
