"""Profiles: how to train on which hardware. A profile lists, per slot, the layers it prefers, and when it may be taken by itself."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptoughts.config import describe, shown
from gptoughts.errors import ConfigError, PlanError, nearest
from gptoughts.machine import Machine

GIB = 1024**3
_PACKAGE = Path(__file__).parent


class Match(BaseModel):
    """Conditions under which `auto` may take the profile; the least capable GPU decides."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

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
        least = machine.least_capability()
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
    match: dict[str, Any] = {}
    slots: dict[str, list[str | dict[str, Any]]] = {}


@dataclass(frozen=True)
class Want:
    """A layer that somebody asks for in a slot. A demanded one is stopped only by what cannot be."""

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
    slots: Mapping[str, tuple[Want, ...]]
    path: str


def folder() -> Path:
    """The shipped profiles: beside the package in a checkout, inside it when installed from a wheel."""
    beside = _PACKAGE.parent / "profiles"
    inside = _PACKAGE / "profiles"
    return inside if inside.is_dir() else beside


def names() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(path.stem for path in folder().glob("*.toml"))


def read(name: str) -> Profile:
    """The profile `name`: a shipped one, or a path to a .toml file. Raises ConfigError."""
    path = _find(name)
    raw = _parse(path)
    base = _parse(_find(raw.extends, path)) if raw.extends else None
    if base is not None and base.extends:
        raise ConfigError(
            f"{shown(path)}: extends {raw.extends!r}, which itself extends {base.extends!r}; one level is allowed"
        )
    inherited = _wants(base, _find(raw.extends, path)) if base is not None and raw.extends else {}
    match = raw.match or (base.match if base else {})
    return Profile(raw.name, raw.note, raw.auto, _match(match, path), {**inherited, **_wants(raw, path)}, shown(path))


def _find(name: str, beside: Path | None = None) -> Path:
    candidates = [Path(name)] if name.endswith(".toml") or "/" in name else [folder() / f"{name}.toml"]
    if beside is not None:
        candidates = [beside.parent / f"{name}.toml", *candidates]
    for path in candidates:
        if path.is_file():
            return path
    raise ConfigError(f"no profile {name!r}{nearest(name, names())}; shipped: {', '.join(names())}, or a path to a .toml file")


def _parse(path: Path) -> _File:
    try:
        return _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shown(path)}: not TOML: {error}") from None
    except ValidationError as error:
        known = list(_File.model_fields)
        raise ConfigError(f"{shown(path)}:\n" + "\n".join(f"  {line}" for line in describe(error, known))) from None


def _match(raw: dict[str, Any], path: Path) -> Match:
    try:
        return Match.model_validate(raw)
    except ValidationError as error:
        lines = describe(error, list(Match.model_fields))
        raise ConfigError(f"{shown(path)}: [match]\n" + "\n".join(f"  {line}" for line in lines)) from None


def _wants(raw: _File, path: Path) -> dict[str, tuple[Want, ...]]:
    wants = {}
    for slot, entries in raw.slots.items():
        rows = []
        for entry in entries:
            options = {} if isinstance(entry, str) else {key: value for key, value in entry.items() if key != "layer"}
            layer = entry if isinstance(entry, str) else entry.get("layer")
            if not isinstance(layer, str):
                raise ConfigError(f"{shown(path)}: slots.{slot}: needs a layer's name or {{layer = NAME, ...}}, here {entry!r}")
            rows.append(Want(layer, options, shown(path)))
        if not rows:
            raise ConfigError(f"{shown(path)}: slots.{slot} is empty; leave the key out to take the baseline")
        wants[slot] = tuple(rows)
    return wants


def pick(name: str, machine: Machine) -> Profile:
    """The profile for `machine`: `auto` takes the one whose conditions hold and that has most of them; any other name is a demand.

    Raises ConfigError for an unknown name, PlanError where `auto` finds none or two that tie.
    """
    if name != "auto":
        profile = read(name)
        demanded = {
            slot: tuple(Want(want.layer, want.options, want.origin, demanded=True) for want in wants)
            for slot, wants in profile.slots.items()
        }
        return Profile(profile.name, profile.note, profile.auto, profile.match, demanded, profile.path)
    holding = [profile for profile in map(read, names()) if profile.auto and profile.match.holds(machine)]
    if not holding:
        raise PlanError(f"no profile matches {machine.label()}\n  try: --profile NAME with one of {', '.join(names())}")
    most = max(profile.match.conditions for profile in holding)
    best = [profile for profile in holding if profile.match.conditions == most]
    if len(best) > 1:
        both = " and ".join(profile.path for profile in best)
        raise PlanError(f"{both} match {machine.label()} equally well\n  try: --profile {best[0].name}")
    return best[0]
