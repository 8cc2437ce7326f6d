"""Profiles: preferred layers per slot, and the hardware for which `auto` picks the profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptoughts.config.loader import describe, find_toml, read_toml, shown
from gptoughts.console import GIB
from gptoughts.errors import ConfigError, PlanError, listed
from gptoughts.errors import describe as describe_problem
from gptoughts.files import is_path
from gptoughts.hardware.machine import Machine

_PACKAGE = Path(__file__).parents[1]


class Match(BaseModel):
    """Conditions under which `auto` picks the profile; the least capable GPU decides."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    gpu: bool | None = None
    min_compute_capability: str | None = Field(None, pattern=r"^\d+\.\d+$")
    max_compute_capability: str | None = Field(None, pattern=r"^\d+\.\d+$")
    min_memory_gb: float | None = None
    max_memory_gb: float | None = None

    @property
    def conditions(self) -> int:
        """Number of conditions that are set."""
        return len(self.model_dump(exclude_none=True))

    def holds(self, machine: Machine) -> bool:
        """Return whether all conditions hold on `machine`; a condition on an unknown value does not hold."""
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
    """A layer requested for a slot.

    `demanded` requests come from the command line or a profile named there: if none is expected to pay off, the first that can run is taken.
    """

    layer: str
    options: Mapping[str, Any]
    origin: str
    required: bool = False


@dataclass(frozen=True)
class Profile:
    """A profile with its `extends` applied; slots that it does not name get their baseline."""

    name: str
    note: str
    auto: bool
    match: Match
    slots: Mapping[str, tuple[LayerRequest, ...]]
    path: str


def folder() -> Path:
    """Return the folder of the shipped profiles: beside the package in a checkout, inside it in a wheel."""
    beside = _PACKAGE.parent / "profiles"
    inside = _PACKAGE / "profiles"
    return inside if inside.is_dir() else beside


def names() -> list[str]:
    """Return the names of the shipped profiles."""
    return sorted(path.stem for path in folder().glob("*.toml"))


def find(name: str) -> Path:
    """Return the file of a shipped profile, or `name` itself if it is a path to a .toml file. Raises ConfigError."""
    return find_toml("profile", name, folder(), names())


def read(name: str) -> Profile:
    """Read a shipped profile, or one from a path to a .toml file. Raises ConfigError."""
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
                f"{shown(path)}: extends {raw.extends!r} ({shown(base_path)}), which itself extends {base.extends!r}. "
                "Only one level is supported"
            )
    return Profile(raw.name, raw.note, raw.auto, match or Match(), {**inherited, **slots}, shown(path))


def _find_base(name: str, child: Path) -> Path:
    """Resolve `extends`: a path relative to the profile, a profile of that name beside it, or a shipped one; never itself."""
    beside = child.parent / (name if name.endswith(".toml") else f"{name}.toml")
    if is_path(str(beside)) and beside.is_file() and beside.resolve() != child.resolve():
        return beside
    try:
        found = find_toml("profile", name, folder(), names())
    except ConfigError as error:
        raise ConfigError(f"{shown(child)}: extends {name!r}: {error}") from None
    if found.resolve() == child.resolve():
        raise ConfigError(f"{shown(child)}: extends itself")
    return found


def _parse(path: Path) -> tuple[_File, dict[str, tuple[LayerRequest, ...]]]:
    """Read the file and its slots; report all problems in one error. Slot and layer names are checked later, by `requests`."""
    values = read_toml(path)
    problems: list[str] = []
    slots = _requests(values.get("slots", {}), shown(path), problems)
    try:
        raw = _File.model_validate({**values, "slots": {}})
    except ValidationError as error:
        problems += describe(error, [*_File.model_fields, *(f"match.{key}" for key in Match.model_fields)])
    if problems:
        raise listed(f"{shown(path)}: invalid profile", problems)
    return raw, slots


def _requests(slots: Any, origin: str, problems: list[str]) -> dict[str, tuple[LayerRequest, ...]]:
    if not isinstance(slots, dict):
        problems.append(describe_problem("slots: must be a table", repr(slots)))
        return {}
    requests = {}
    for slot, entries in slots.items():
        if not isinstance(entries, list) or not entries:
            problems.append(
                describe_problem(f"slots.{slot}: needs a list of layers; omit the key for the baseline", repr(entries))
            )
            continue
        rows = []
        for entry in entries:
            layer = entry.get("layer") if isinstance(entry, dict) else entry
            if isinstance(layer, str):
                options = {key: value for key, value in entry.items() if key != "layer"} if isinstance(entry, dict) else {}
                rows.append(LayerRequest(layer, options, origin))
            else:
                problems.append(describe_problem(f"slots.{slot}: needs a layer name or {{layer = NAME, ...}}", repr(entry)))
        twice = {row.layer for row in rows if sum(row.layer == other.layer for other in rows) > 1}
        problems += [f"slots.{slot}: {layer} is listed twice" for layer in sorted(twice)]
        requests[slot] = tuple(rows)
    return requests


def pick(name: str, machine: Machine) -> Profile:
    """Return the profile for `machine`. `auto` picks the matching one with the most conditions; layers of any other are demanded.

    Raises ConfigError for an unknown name, PlanError if `auto` finds no profile or a tie.
    """
    if name != "auto":
        profile = read(name)
        required = {
            slot: tuple(replace(request, required=True) for request in requests) for slot, requests in profile.slots.items()
        }
        return replace(profile, slots=required)
    holding = [profile for profile in map(read, names()) if profile.auto and profile.match.holds(machine)]
    if not holding:
        raise PlanError(
            f"--profile auto: no profile matches {machine.label()}", fix=f"--profile NAME, one of {', '.join(names())}"
        )
    most = max(profile.match.conditions for profile in holding)
    best = [profile for profile in holding if profile.match.conditions == most]
    if len(best) > 1:
        both = " and ".join(profile.path for profile in best)
        raise PlanError(f"--profile auto: {both} match {machine.label()} equally well", fix=f"--profile {best[0].name}")
    return best[0]
