"""Cards of layers: what the file says, what the record says. docs/layers.md is these pages, and a test compares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gptoughts.planning.layer import SLOTS, Layer


def card(layer: Layer) -> str:
    """One layer as text: its effect, needs, changes, undo, conflicts and options."""
    return "\n".join([f"{layer.slot} = {layer.name}", "", layer.card.strip(), "", *_facts(layer)])


def _facts(layer: Layer) -> Iterator[str]:
    needs = ["an NVIDIA GPU"] if layer.needs_gpu and not layer.min_capability else []
    needs += [f"compute capability {'.'.join(map(str, layer.min_capability))}"] if layer.min_capability else []
    needs += [f"{package} (pip install 'gptoughts[{extra}]')" for package, extra in layer.packages]
    needs += [f"{slot} = {' or '.join(names)}" for slot, names in layer.needs_slots.items()]
    yield f"- needs: {', '.join(needs) or 'nothing beyond what fits() asks'}"
    yield f"- applied: {layer.when}"
    if layer.wraps or layer.replaces:
        verbs = [f"wraps {verb}" for verb in layer.wraps] + [f"replaces {verb}" for verb in layer.replaces]
        yield f"- verbs: {', '.join(verbs)}"
    for other, reason in layer.clashes.items():
        yield f"- clashes with {other}: {reason}"
    yield f"- changes numerics: {'yes' if layer.changes_numerics else 'no'}; repeatable bit for bit: {_repeatable(layer)}"
    yield f"- undo: {layer.permanent or 'yes'}"
    for name, option in layer.options.items():
        choices = f", one of {', '.join(option.choices)}" if option.choices else ""
        flag = f"--layer.{layer.slot}.{name}".replace("_", "-")
        yield f"- option `{flag}`: {option.help} (default {'none' if option.default is None else option.default}{choices})"
    yield f"- measured: {layer.measured}"


def _repeatable(layer: Layer) -> str:
    if not layer.repeatable:
        return "no"
    return "yes" if layer.repeatable_on_gpu else "on a CPU; not on a GPU"


def layers_page(catalog: Mapping[str, Layer]) -> str:
    """docs/layers.md: every slot with its layers, in order."""
    lines = [
        "# Layers",
        "",
        "One optimization per slot. `gptoughts layers` says which fit here, `gptoughts plan` which a recipe gets and why.",
        "This page is printed by `gptoughts layers --markdown`.",
    ]
    for slot in SLOTS:
        lines += ["", f"## {slot}"]
        for layer in (layer for layer in catalog.values() if layer.slot == slot):
            if layer.baseline:
                lines += ["", f"**{layer.name}** (baseline). {layer.card.strip()}"]
            else:
                lines += ["", f"### {layer.name}", "", layer.card.strip(), "", *_facts(layer)]
    return "\n".join(lines) + "\n"
