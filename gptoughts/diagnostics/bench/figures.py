"""Spread of repeated measurements, the machine they were taken on, and the file that keeps them."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptoughts import __version__
from gptoughts.errors import ConfigError
from gptoughts.hardware.machine import Machine


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, least, greatest and the two quartiles; of a single value that value."""
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    found = {"median": statistics.median(values), "min": min(values), "max": max(values), "q1": lower, "q3": upper}
    return {name: round(value, digits) for name, value in found.items()}


def paired(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Spread of the ratio of two things measured in the same rounds."""
    return spread([one / other for one, other in zip(above, below, strict=True)])


def machine_figures(machine: Machine, threads: int | None = None) -> dict[str, Any]:
    """What has to be known about a machine to read a speed taken on it. `threads` are torch's here unless another process's are given."""
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    figures = {
        "label": machine.label(),
        "cores": machine.cpu.usable_cores,
        "instruction_sets": list(machine.cpu.instruction_sets),
        "threads": threads,
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": machine.packages.get("torch"),
        "gptoughts": __version__,
    }
    if machine.gpus:
        figures |= {"power_limit_watts": machine.gpus[0].power_limit_watts, "driver": machine.driver, "cuda": machine.cuda}
    return figures


def runs_in(path: Path) -> list[dict[str, Any]]:
    """The runs that the file holds, none where there is no file. Raises ConfigError where it is something else."""
    if not path.exists():
        return []
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    except (ValueError, KeyError, TypeError, OSError):
        runs = None
    if not isinstance(runs, list):
        raise ConfigError(f"--to {path}: not a file of measurements; name another")
    return runs


def refuse_unwritable(path: Path) -> None:
    """Raises ConfigError where the file could not take figures: before an hour of measuring, not after it."""
    runs_in(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        part.unlink()
    except OSError as error:
        raise ConfigError(f"--to {path}: cannot be written ({error.strerror}); name another") from None


def keep(path: Path, run: dict[str, Any], key: tuple[str, ...]) -> list[dict[str, Any]]:
    """Put `run` into the file's list of runs, in the place of the one with the same values under `key`. Returns the list.

    Raises ConfigError where the file is something else than a list of runs, or cannot be written.
    """
    runs = [other for other in runs_in(path) if any(other.get(name) != run.get(name) for name in key)] + [run]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"--to {path}: cannot be written ({error.strerror}); name another") from None
    return runs
