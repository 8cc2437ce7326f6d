"""Spread of repeated measurements, the machine they were taken on, and the file that keeps them."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gptoughts import __version__
from gptoughts.errors import ConfigError
from gptoughts.machine import Machine


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, least, greatest and the two quartiles."""
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    found = {"median": statistics.median(values), "min": min(values), "max": max(values), "q1": lower, "q3": upper}
    return {name: round(value, digits) for name, value in found.items()}


def paired(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Spread of the ratio of two things measured in the same rounds."""
    return spread([one / other for one, other in zip(above, below, strict=True)])


def machine_figures(machine: Machine) -> dict[str, Any]:
    """What has to be known about a machine to read a speed taken on it."""
    return {
        "label": machine.label(),
        "cores": machine.cpu.usable_cores,
        "instruction_sets": list(machine.cpu.instruction_sets),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gptoughts": __version__,
    }


def keep(path: Path, run: dict[str, Any], key: tuple[str, ...]) -> None:
    """Put `run` into the file's list of runs, in the place of the one with the same values under `key`.

    Raises ConfigError where the file is something else than a list of runs.
    """
    runs: list[dict[str, Any]] = []
    if path.exists():
        try:
            runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        except (ValueError, KeyError, TypeError, OSError):
            raise ConfigError(f"--to {path}: not a file of measurements; name another") from None
    runs = [other for other in runs if any(other.get(name) != run.get(name) for name in key)]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({"runs": [*runs, run]}, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
