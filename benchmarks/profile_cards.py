"""Cards of profiles: what each chooses in which order, why, what was measured where. profiles/README.md is this page, and a test compares."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptoughts.config.loader import Recipe
from gptoughts.config.model_spec import spec_for
from gptoughts.console import bytes_in_words
from gptoughts.errors import PlanError
from gptoughts.hardware.machine import Machine, World
from gptoughts.planning.layer import SLOTS, Choice, Layer
from gptoughts.planning.profile import LayerRequest, Match, Profile, pick
from gptoughts.planning.resolve import Plan, resolve

NOT_MEASURED = "not measured"
# Newer than any bound of a layer.
ANY_VERSION = "99"


@dataclass(frozen=True)
class Figure:
    """A measured line of one profile. `slot` is set where it is the gain of one layer, which `layer` names."""

    profile: str
    text: str
    file: str
    machine: str
    slot: str = ""
    layer: str = ""


def profiles_page(
    profiles: Iterable[Profile],
    catalog: Mapping[str, Layer],
    boxes: Mapping[str, Machine],
    models: Mapping[str, Recipe],
    figures: Iterable[Figure],
) -> str:
    """The page: a card per profile. `boxes` are machines by the file they stand in, `models` what is planned on them, by name."""
    known, measured = list(profiles), list(figures)
    lines = [
        "# What each profile chooses, and why",
        "",
        "Printed from the profiles beside this file, the catalog of layers and the files under `docs/measurements/`; a test compares.",
        "`UPDATE_GOLDEN=1 python -m pytest tests/project/test_cards.py` writes it anew. How `auto` picks, and how to write one of your own:",
        "[docs/profiles.md](../docs/profiles.md). The card of every layer: [docs/layers.md](../docs/layers.md).",
        "",
        "In each slot the first layer that can run and pays is taken. A gain is a ratio of speeds, above 1 is faster: *in the plan* compares",
        "the plan with the plan without that layer, *alone* the baseline with it and the baseline. `not measured` means just that.",
        "",
        "| profile | for | taken by `auto` |",
        "|---|---|---|",
        *(f"| [{one.name}](#{one.name}) | {one.note.partition(':')[0].rstrip('.')} | {_when(one)} |" for one in known),
    ]
    for profile in known:
        lines += [
            "",
            *_card(profile, catalog, _box(profile, boxes), models, [one for one in measured if one.profile == profile.name]),
        ]
    return "\n".join(lines) + "\n"


def _when(profile: Profile) -> str:
    return _conditions(profile.match) if profile.auto else f"never; by name, meant for {_conditions(profile.match)}"


def _conditions(match: Match) -> str:
    if match.gpu is False:
        return "no GPU"
    low, high = match.min_compute_capability, match.max_compute_capability
    if low is None and high is None:
        words = ["a GPU"]
    elif low == high:
        words = [f"compute capability {low}"]
    else:
        words = [f"compute capability {low or 'any'} {f'to {high}' if high else 'and above'}"]
    if match.min_memory_gb is not None:
        words.append(f"{match.min_memory_gb:g} GiB and more")
    if match.max_memory_gb is not None:
        words.append(f"{match.max_memory_gb:g} GiB at most")
    return ", ".join(words)


def _box(profile: Profile, boxes: Mapping[str, Machine]) -> tuple[str, Machine] | None:
    """The plainest machine that the profile is for: auto takes it there, fewest GPUs, most that a CPU can."""
    there = [
        (len(machine.gpus), -len(machine.cpu.instruction_sets), name)
        for name, machine in boxes.items()
        if "torch" in machine.packages
        and profile.match.holds(machine)
        and (not profile.auto or pick("auto", machine).name == profile.name)
    ]
    return (min(there)[2], boxes[min(there)[2]]) if there else None


def _card(
    profile: Profile,
    catalog: Mapping[str, Layer],
    box: tuple[str, Machine] | None,
    models: Mapping[str, Recipe],
    figures: list[Figure],
) -> Iterator[str]:
    yield f"## {profile.name}"
    yield ""
    yield f"{profile.note} Taken by `auto`: {_when(profile)}."
    yield ""
    yield "| slot | layers, in this order | what the first does | measured |"
    yield "|---|---|---|---|"
    for slot in SLOTS:
        if slot in profile.slots:
            yield _row(slot, profile.slots[slot], catalog, figures)
    plain = [f"{slot} ({_baseline(slot, catalog)})" for slot in SLOTS if slot not in profile.slots]
    yield ""
    yield f"Plain PyTorch: {', '.join(plain)}." if plain else "Every slot is named."
    yield ""
    yield from _why(profile, catalog, box, models)
    yield ""
    yield from _measured(figures)


def _row(slot: str, wants: tuple[LayerRequest, ...], catalog: Mapping[str, Layer], figures: list[Figure]) -> str:
    names = ", ".join(f"`{want.layer}`{_options(want.options)}" for want in wants)
    first = catalog.get(wants[0].layer)
    effect = first_sentence(first.card) if first else "not in the catalog"
    return f"| {slot} | {names} | {effect} | {_measured_of(slot, wants, catalog, figures)} |"


def _options(options: Mapping[str, Any]) -> str:
    return f" ({', '.join(f'{name} {value}' for name, value in options.items())})" if options else ""


def first_sentence(card: str) -> str:
    """The effect: a card begins with it."""
    text = " ".join(card.split())
    match = re.match(r"(.+?[.:;])(?:\s|$)", text)
    return (match[1] if match else text).rstrip(".:;").replace("|", "\\|")


def _measured_of(slot: str, wants: tuple[LayerRequest, ...], catalog: Mapping[str, Layer], figures: list[Figure]) -> str:
    """Gains of this profile's layers where there are any, else what the layers' own records say."""
    asked = [want.layer for want in wants]
    own = [f"`{one.layer}` {one.text} ({_link(one.file)})" for one in figures if one.slot == slot and one.layer in asked]
    if own:
        return "; ".join(own)
    told = {}
    for name in asked:
        layer = catalog.get(name)
        if layer is not None and not layer.baseline:
            told[name] = layer.measured
    if all(words == NOT_MEASURED for words in told.values()):
        return NOT_MEASURED if told else "the yardstick"
    return "; ".join(f"`{name}`: {_linked(words)}" for name, words in told.items())


def _link(file: str) -> str:
    return f"[{file.removeprefix('docs/measurements/')}](../{file})"


def _linked(words: str) -> str:
    return re.sub(r"docs/measurements/[\w./-]+\.(?:json|md)", lambda match: _link(match[0]), words).replace("|", "\\|")


def _baseline(slot: str, catalog: Mapping[str, Layer]) -> str:
    return next((layer.name for layer in catalog.values() if layer.slot == slot and layer.baseline), "no layer")


def _why(
    profile: Profile, catalog: Mapping[str, Layer], box: tuple[str, Machine] | None, models: Mapping[str, Recipe]
) -> Iterator[str]:
    """Where a first wish is not what a model gets, on a machine of this kind, with the reason that the plan prints."""
    if box is None:
        yield "No machine file stands for this profile, so no plan is shown."
        return
    name, listed = box
    machine = _with_packages(listed, catalog)
    chosen = pick(profile.name if not profile.auto else "auto", machine)
    place = f"{machine.label()} ([{Path(name).name}](../{name}))"
    yield f"Passed over on {place}, in one process, if every package that a layer wants were installed:"
    yield ""
    yield "| slot | not | but | for | because |"
    yield "|---|---|---|---|---|"
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for called, recipe in models.items():
        for row in _passed_over(chosen, machine, recipe, catalog):
            rows.setdefault(row, []).append(called)
    if not rows:
        yield f"| all | nothing | the first of each list | {', '.join(models)} | |"
    for (slot, wanted, taken, why), names in sorted(rows.items(), key=lambda row: _position(row[0][0])):
        who = "every model here" if len(names) == len(models) else ", ".join(names)
        yield f"| {slot} | {wanted} | {taken} | {who} | {why} |"


def _with_packages(machine: Machine, catalog: Mapping[str, Layer]) -> Machine:
    """The same machine with the packages of all layers, so that sizes decide and not what somebody has installed."""
    wanted = {package: ANY_VERSION for layer in catalog.values() for package, _ in layer.packages}
    return replace(machine, packages={**wanted, **machine.packages})


def _position(slot: str) -> int:
    return SLOTS.index(slot) if slot in SLOTS else -1


def _passed_over(
    profile: Profile, machine: Machine, recipe: Recipe, catalog: Mapping[str, Layer]
) -> Iterator[tuple[str, str, str, str]]:
    try:
        plan: Plan = resolve(profile, machine, spec_for(recipe), recipe, World(), catalog)
    except PlanError as error:
        yield "all", "the profile", "no plan", " ".join(str(error).split()).replace("|", "\\|")
        return
    for choice in plan.choices:
        for layer, reasons in choice.rejected:
            yield choice.slot, f"`{layer}`", f"`{choice.layer}`", "; ".join(map(str, reasons)).replace("|", "\\|")
        yield from _losses(choice)


def _losses(choice: Choice) -> Iterator[tuple[str, str, str, str]]:
    for reason in choice.expected_slowdown:
        yield choice.slot, "nothing", f"`{choice.layer}`, demanded all the same", f"expect a loss: {reason}".replace("|", "\\|")


def _measured(figures: list[Figure]) -> Iterator[str]:
    whole = [figure for figure in figures if not figure.slot]
    if not whole:
        yield f"Measured as a whole: {NOT_MEASURED}."
        return
    yield "Measured as a whole:"
    yield ""
    for figure in whole:
        yield f"- {figure.text}; {figure.machine} ({_link(figure.file)})"


# What files under docs/measurements/ say.


def read_figures(root: Path, profiles: Iterable[Profile]) -> list[Figure]:
    """Every line about a profile in the JSON files under docs/measurements/ of `root`, in the order of their names."""
    known = list(profiles)
    found: list[Figure] = []
    for path in sorted((root / "docs" / "measurements").glob("*/*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        runs = values.get("runs") if isinstance(values, dict) else None
        named = runs.items() if isinstance(runs, dict) else [("", run) for run in runs] if isinstance(runs, list) else []
        for name, run in named:
            if isinstance(run, dict):
                found += _figures_of(name, {"machine": values.get("machine"), **run}, str(path.relative_to(root)), known)
    return found


def _figures_of(name: str, run: dict[str, Any], file: str, profiles: list[Profile]) -> Iterator[Figure]:
    machine = _label(run.get("machine"))
    profile = run.get("profile") or _profile_for(machine, profiles)
    if not isinstance(profile, str):
        return
    called = str(run.get("recipe") or name)
    if run.get("what") == "bench step":
        yield Figure(profile, _step_text(called, run), file, machine)
    elif run.get("what") == "bench layers":
        whole = (run.get("whole") or {}).get("measured")
        if whole:
            yield Figure(profile, f"{called}: {_ratio(whole)} times its own baseline, every slot plain PyTorch", file, machine)
        for slot, gain in (run.get("gains") or {}).items():
            words = [
                f"{_ratio(gain[how])} {said}" for how, said in (("in_plan", "in the plan"), ("alone", "alone")) if gain.get(how)
            ]
            if words:
                yield Figure(profile, f"{', '.join(words)}, {called}", file, machine, slot, gain["layer"])
    elif isinstance(run.get("plan"), dict) and run.get("tokens_per_second"):
        yield Figure(profile, f"{name or called}: {_speed_text(run)}", file, machine)


def _step_text(called: str, run: dict[str, Any]) -> str:
    words = [f"{called}: {_speed_text(run['variants']['ours'])}"]
    ratios = run.get("ratios_of_tokens_per_second", {})
    for key, said in (("ours / fp32 eager", "float32 eager"), ("ours / plain", "a bare loop with the same settings")):
        if key in ratios:
            words.append(f"{_ratio(ratios[key])} times {said}")
    return ", ".join(words)


def _speed_text(figures: Mapping[str, Any]) -> str:
    words = [f"{figures['tokens_per_second']:,.0f} tokens/s"]
    words += [f"MFU {figures['mfu']:.1%}"] if figures.get("mfu") else ["MFU n/a"]
    peak = figures.get("peak_memory_bytes") or figures.get("peak_bytes")
    words += [f"peak {bytes_in_words(peak)}"] if peak else []
    return ", ".join(words)


def _ratio(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.2f}x"


def _label(machine: Any) -> str:
    known = machine if isinstance(machine, dict) else {"label": machine}
    return str(known.get("label") or known.get("gpu") or known.get("cpu") or "machine not named")


def _profile_for(label: str, profiles: list[Profile]) -> str | None:
    """The profile that auto takes for a label such as `1 x NVIDIA H100 80GB HBM3 (sm 9.0)`, where one alone says its capability."""
    match = re.search(r"\(sm (\d+)\.(\d+)\)", label)
    if match is None:
        return "cpu" if label.startswith("CPU: ") else None
    here = int(match[1]), int(match[2])
    fitting = [
        one.name
        for one in profiles
        if one.auto and one.match.gpu and _holds(one.match, here) and one.match.min_memory_gb is None
    ]
    return fitting[0] if len(fitting) == 1 else None


def _holds(match: Match, here: tuple[int, int]) -> bool:
    least, most = _pair(match.min_compute_capability), _pair(match.max_compute_capability)
    return (least is None or here >= least) and (most is None or here <= most)


def _pair(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    major, minor = text.split(".")
    return int(major), int(minor)
