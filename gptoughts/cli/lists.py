"""`gptoughts recipes`, `profiles` and `layers`: list them, or print one."""

from __future__ import annotations

from gptoughts.api import default_recipe
from gptoughts.config import loader as config
from gptoughts.config.model_spec import spec_for
from gptoughts.console import print_result
from gptoughts.errors import ConfigError, PlanError, nearest
from gptoughts.hardware.machine import probe
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.planning import profile
from gptoughts.planning.layer import SLOTS, Case, Kind, Layer


def recipes(name: str | None) -> int:
    """Print names and notes, or one recipe's file."""
    if name is not None:
        config.load(name)
        print_result(config.find_recipe(name).read_text(encoding="utf-8"), end="", raw=True)
        return 0
    notes = {known: config.read_toml(config.PACKAGED_RECIPES / f"{known}.toml") for known in config.recipe_names()}
    _print([(known, table.get("note", "")) for known, table in notes.items()])
    return 0


def profiles(name: str | None) -> int:
    """Print names and notes with the choice of auto marked, or one profile's file."""
    if name is not None:
        profile.read(name)
        print_result(profile.find(name).read_text(encoding="utf-8"), end="", raw=True)
        return 0
    machine = probe()
    try:
        picked, footer = profile.pick("auto", machine).name, "* picked by --profile auto on this machine"
    except PlanError as error:
        picked, footer = "", str(error)
    known = [profile.read(one) for one in profile.names()]
    _print(
        [
            (f"{'*' if one.name == picked else ' '} {one.name}", one.note + ("" if one.auto else " [by name only]"))
            for one in known
        ]
    )
    print_result(footer)
    return 0


def layers(name: str | None, markdown: bool) -> int:
    """Print one line per layer with its state on this machine, one card, or docs/layers.md."""
    if markdown:
        from gptoughts.cli.cards import layers_page

        print_result(layers_page(CATALOG), end="", raw=True)
        return 0
    if name is not None:
        if name not in CATALOG:
            raise ConfigError(f"no layer {name!r}{nearest(name, CATALOG)}. Layers: {', '.join(CATALOG)}")
        from gptoughts.cli.cards import card

        print_result(card(CATALOG[name]))
        return 0
    machine = probe()
    recipe = config.load(default_recipe(machine)).recipe
    case = Case(machine, spec_for(recipe), recipe, World())
    wide, wider = (2 + max(map(len, names)) for names in (SLOTS, CATALOG))
    for slot in SLOTS:
        for layer in (layer for layer in CATALOG.values() if layer.slot == slot):
            print_result(f"{slot:<{wide}}{layer.name:<{wider}}{_state(layer, case)}")
    print_result(f"for recipe {recipe.name} on {machine.label()}. Details: gptoughts layers NAME")
    return 0


def _state(layer: Layer, case: Case) -> str:
    if layer.baseline:
        return "baseline"
    reasons = layer.rejections(case, layer.read_options({}, layer.name))
    if not reasons:
        return "available"
    worst = next((reason for reason in reasons if reason.kind is Kind.UNSUPPORTED), reasons[0])
    return f"{worst.kind}: {worst}"


def _print(rows: list[tuple[str, str]]) -> None:
    width = max(len(row[0]) for row in rows)
    for first, second in rows:
        print_result(f"{first:<{width}}  {second}")
