"""Profiles: how to train on which hardware. A profile lists, per slot, the layers it prefers, and when it may be taken by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptoughts.config.loader import describe, find_toml, read_toml, shown
from gptoughts.console import GIB
from gptoughts.errors import ConfigError, PlanError, listed
from gptoughts.hardware.machine import Machine

_PACKAGE = Path(__file__).parents[1]


class Match(BaseModel):
    """Conditions under which `auto` may take the profile; the least capable GPU decides."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    gpu: bool | None = None
    min_compute_capability: str | None = Field(None, pattern=r"^\d+\.\d+$")
    max_compute_capability: str | None = Field(None, pattern=r"^\d+\.\d+$")
    min_memory_gb: float | None = None
    max_memory_gb: float | None = None

    @property
    def conditions(self) -> int:
        """How many conditions are set."""
        return len(self.model_dump(exclude_none=True))

    def holds(self, machine: Machine) -> bool:
        """Whether every condition that is set holds on `machine`; what is unknown there does not hold."""
        least = machine.min_capability()
        sizes = [gpu.memory_bytes for gpu in machine.gpus]
        memory = min((size for size in sizes if size is not None), default=None) if None not in sizes else None
        checks = (
            self.gpu is None or self.gpu == bool(machine.gpus),
            self.min_compute_capability is None or (least is not None and least >= _version(self.min_compute_capability)),
            self.max_compute_capability is None or (least is not None and least <= _version(self.max_compute_capability)),
            self.min_memory_gb is None or (memory is not None and memory / GIB >= self.min_memory_gb),
            self.max_memory_gb is None or (memory is not None and memory / GIB <= self.max_memory_gb),
        )
        return all(checks)


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


class _File(BaseModel):
    """A profile as written in TOML."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    note: str = ""
    auto: bool = True
    extends: str | None = None
    match: Match | None = None
    slots: dict[str, Any] = {}


@dataclass(frozen=True)
class LayerRequest:
    """A layer that somebody asks for in a slot. Of several demanded ones the first that pays is taken, else the first that can run."""

    layer: str
    options: Mapping[str, Any]
    origin: str
    demanded: bool = False


@dataclass(frozen=True)
class Profile:
    """A profile with its `extends` applied; slots that it does not name take their baseline."""

    name: str
    note: str
    auto: bool
    match: Match
    slots: Mapping[str, tuple[LayerRequest, ...]]
    path: str


def folder() -> Path:
    """The shipped profiles: beside the package in a checkout, inside it when installed from a wheel."""
    beside = _PACKAGE.parent / "profiles"
    inside = _PACKAGE / "profiles"
    return inside if inside.is_dir() else beside


def names() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(path.stem for path in folder().glob("*.toml"))


def find(name: str) -> Path:
    """The file of a shipped profile, or the path to a .toml file that `name` is. Raises ConfigError."""
    return find_toml("profile", name, folder(), names())


def read(name: str) -> Profile:
    """The profile `name`: a shipped one, or a path to a .toml file. Raises ConfigError."""
    path = find(name)
    raw, slots = _parse(path)
    match = raw.match
    inherited: dict[str, tuple[LayerRequest, ...]] = {}
    if raw.extends is not None:
        base_path = _find_base(raw.extends, path)
        base, inherited = _parse(base_path)
        match = match or base.match
        if base.extends is not None:
            raise ConfigError(
                f"{shown(path)}: extends {raw.extends!r} ({shown(base_path)}), which itself extends {base.extends!r}; "
                "one level is allowed"
            )
    return Profile(raw.name, raw.note, raw.auto, match or Match(), {**inherited, **slots}, shown(path))


def _find_base(name: str, child: Path) -> Path:
    """What `extends` means: a path beside the profile, a profile of that name beside it, or a shipped one; never the profile itself."""
    beside = child.parent / (name if name.endswith(".toml") else f"{name}.toml")
    if beside.is_file() and beside.resolve() != child.resolve():
        return beside
    try:
        found = find_toml("profile", name, folder(), names())
    except ConfigError as error:
        raise ConfigError(f"{shown(child)}: extends {name!r}: {error}") from None
    if found.resolve() == child.resolve():
        raise ConfigError(f"{shown(child)}: extends itself")
    return found


def _parse(path: Path) -> tuple[_File, dict[str, tuple[LayerRequest, ...]]]:
    """The file and its slots, with every problem of both told at once. Names of slots and layers are judged by the plan."""
    values = read_toml(path)
    problems: list[str] = []
    slots = _wants(values.get("slots", {}), shown(path), problems)
    try:
        raw = _File.model_validate({**values, "slots": {}})
    except ValidationError as error:
        problems += describe(error, [*_File.model_fields, *(f"match.{key}" for key in Match.model_fields)])
    if problems:
        raise listed(f"{shown(path)} cannot be used", problems)
    return raw, slots


def _wants(slots: Any, origin: str, problems: list[str]) -> dict[str, tuple[LayerRequest, ...]]:
    if not isinstance(slots, dict):
        problems.append(f"slots: is a table, here {slots!r}")
        return {}
    wants = {}
    for slot, entries in slots.items():
        if not isinstance(entries, list) or not entries:
            problems.append(f"slots.{slot}: needs a list of layers; leave the key out to take the baseline, here {entries!r}")
            continue
        rows = []
        for entry in entries:
            layer = entry.get("layer") if isinstance(entry, dict) else entry
            if isinstance(layer, str):
                options = {key: value for key, value in entry.items() if key != "layer"} if isinstance(entry, dict) else {}
                rows.append(LayerRequest(layer, options, origin))
            else:
                problems.append(f"slots.{slot}: needs a layer's name or {{layer = NAME, ...}}, here {entry!r}")
        twice = {row.layer for row in rows if sum(row.layer == other.layer for other in rows) > 1}
        problems += [f"slots.{slot}: {layer} is listed twice" for layer in sorted(twice)]
        wants[slot] = tuple(rows)
    return wants


def pick(name: str, machine: Machine) -> Profile:
    """The profile for `machine`: `auto` takes the one whose conditions hold and that has most of them; any other name is a demand.

    Raises ConfigError for an unknown name, PlanError where `auto` finds none or two that tie.
    """
    if name != "auto":
        profile = read(name)
        demanded = {slot: tuple(replace(want, demanded=True) for want in wants) for slot, wants in profile.slots.items()}
        return replace(profile, slots=demanded)
    holding = [profile for profile in map(read, names()) if profile.auto and profile.match.holds(machine)]
    if not holding:
        raise PlanError(f"no profile matches {machine.label()}\n  try: --profile NAME with one of {', '.join(names())}")
    most = max(profile.match.conditions for profile in holding)
    best = [profile for profile in holding if profile.match.conditions == most]
    if len(best) > 1:
        both = " and ".join(profile.path for profile in best)
        raise PlanError(f"{both} match {machine.label()} equally well\n  try: --profile {best[0].name}")
    return best[0]
