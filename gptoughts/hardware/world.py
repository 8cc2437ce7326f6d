"""Rank, local rank and number of processes, from the variables that a launcher sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from json import dumps
from typing import Any, ClassVar

from pydantic import ConfigDict, NonNegativeInt

from gptoughts.errors import ConfigError
from gptoughts.hardware.records import STRICT, validate

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class World:
    """Rank and world size of this process; `launcher` is `single` or `torchrun`."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    rank: NonNegativeInt = 0
    local_rank: NonNegativeInt = 0
    world_size: NonNegativeInt = 1
    local_world_size: NonNegativeInt = 1
    launcher: str = "single"

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers and strings."""
        return asdict(self)

    @staticmethod
    def from_json(value: object, source: str = "world") -> World:
        """Return the world of a JSON value. Raises ConfigError as `Machine.from_json`."""
        return validate(World, dumps(value), source)


def world_from_environment(environment: Mapping[str, str]) -> World:
    """Return the rank that torchrun set, or a single process without its variables.

    Raises ConfigError naming variables that are missing, not integers or contradictory.
    """
    present = {name: environment[name] for name in RANK_VARIABLES if name in environment}
    if not present:
        return World()
    found = ", ".join(f"{name}={value}" for name, value in present.items())
    missing = [name for name in RANK_VARIABLES if name not in present]
    if missing:
        raise ConfigError(
            f"environment: {found} without {', '.join(missing)}",
            fix=f"start the ranks with torchrun, or unset {', '.join(present)}",
        )
    wrong = [f"{name}={value!r}" for name, value in present.items() if not value.strip().isdecimal()]
    if wrong:
        raise ConfigError(f"environment: {', '.join(wrong)}: not a whole number")
    rank, world_size, local_rank, local_world_size = (int(present[name]) for name in RANK_VARIABLES)
    if not (rank < world_size and local_rank < local_world_size <= world_size and local_rank <= rank):
        raise ConfigError(
            "environment: contradictory rank variables; required: RANK < WORLD_SIZE, LOCAL_RANK < LOCAL_WORLD_SIZE"
            " <= WORLD_SIZE and LOCAL_RANK <= RANK",
            found=found,
        )
    return World(rank, local_rank, world_size, local_world_size, "torchrun")
