"""Read the measured lines of profiles from docs/measurements/."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoughts.console import bytes_in_words
from gptoughts.planning.profile import Match, Profile


@dataclass(frozen=True)
class Figure:
    """A measured line of one profile. `slot` and `layer` are set if it is the gain of one layer."""

    profile: str
    text: str
    file: str
    machine: str
    slot: str = ""
    layer: str = ""


def read_figures(root: Path, profiles: Iterable[Profile]) -> list[Figure]:
    """Read the measured lines of all profiles from docs/measurements/*/*.json of `root`, in the order of file names."""
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
    recipe_name = str(run.get("recipe") or name)
    if run.get("what") == "bench step":
        yield Figure(profile, _step_text(recipe_name, run), file, machine)
    elif run.get("what") == "bench layers":
        whole = (run.get("whole") or {}).get("measured")
        if whole:
            yield Figure(profile, f"{recipe_name}: {_ratio(whole)} the baseline, plain PyTorch in every slot", file, machine)
        for slot, gain in (run.get("gains") or {}).items():
            words = [
                f"{_ratio(gain[how])} {label}"
                for how, label in (("in_plan", "in the plan"), ("alone", "alone"))
                if gain.get(how)
            ]
            if words:
                yield Figure(profile, f"{', '.join(words)}, {recipe_name}", file, machine, slot, gain["layer"])
    elif isinstance(run.get("plan"), dict) and run.get("tokens_per_second"):
        yield Figure(profile, f"{name or recipe_name}: {_speed_text(run)}", file, machine)


def _step_text(recipe_name: str, run: dict[str, Any]) -> str:
    words = [f"{recipe_name}: {_speed_text(run['variants']['ours'])}"]
    ratios = run.get("ratios_of_tokens_per_second", {})
    for key, label in (("ours / fp32 eager", "float32 eager"), ("ours / plain", "a bare loop with the same settings")):
        if key in ratios:
            words.append(f"{_ratio(ratios[key])} {label}")
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
    """Return the profile that `auto` picks for a label such as `1 x NVIDIA H100 80GB HBM3 (sm 9.0)`; None if that is ambiguous."""
    match = re.search(r"\(sm (\d+)\.(\d+)\)", label)
    if match is None:
        return "cpu" if label.startswith("CPU: ") else None
    capability = int(match[1]), int(match[2])
    fitting = [
        one.name
        for one in profiles
        if one.auto and one.match.gpu and _holds(one.match, capability) and one.match.min_memory_gb is None
    ]
    return fitting[0] if len(fitting) == 1 else None


def _holds(match: Match, capability: tuple[int, int]) -> bool:
    least, most = _pair(match.min_compute_capability), _pair(match.max_compute_capability)
    return (least is None or capability >= least) and (most is None or capability <= most)


def _pair(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    major, minor = text.split(".")
    return int(major), int(minor)
