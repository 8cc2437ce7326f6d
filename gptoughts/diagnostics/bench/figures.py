"""Statistics of repeated measurements, the machine record, and the JSON file of runs."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptoughts import __version__
from gptoughts.console import redacted
from gptoughts.errors import ConfigError
from gptoughts.files import write_json
from gptoughts.hardware.machine import Machine


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Return median, min, max and quartiles; for a single value, that value."""
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    found = {"median": statistics.median(values), "min": min(values), "max": max(values), "q1": lower, "q3": upper}
    return {name: round(value, digits) for name, value in found.items()}


def paired(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Return the spread of ratios within rounds."""
    return spread([one / other for one, other in zip(above, below, strict=True)])


def machine_figures(machine: Machine, threads: int | None = None) -> dict[str, Any]:
    """Return the machine record of a measurement. `threads` defaults to torch's threads in this process."""
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
    """Return the runs in the file, none if it does not exist. Raises ConfigError for other contents."""
    if not path.exists():
        return []
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    except (ValueError, KeyError, TypeError, OSError):
        runs = None
    if not isinstance(runs, list):
        raise ConfigError(f"--to {path}: not a file of measurements")
    return runs


def refuse_unwritable(path: Path) -> None:
    """Raise ConfigError if the file cannot be written: before measuring, not after."""
    runs_in(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        part.unlink()
    except OSError as error:
        raise ConfigError(f"--to {path}: cannot be written ({error.strerror})") from None


def keep(path: Path, run: dict[str, Any], key: tuple[str, ...]) -> list[dict[str, Any]]:
    """Add `run` to the file, replacing the run with the same values under `key`. Returns all runs.

    Raises ConfigError if the file is not a list of runs or cannot be written.
    """
    runs = [other for other in runs_in(path) if any(other.get(name) != run.get(name) for name in key)] + [redacted(run)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"runs": runs})
    except OSError as error:
        raise ConfigError(f"--to {path}: cannot be written ({error.strerror})") from None
    return runs
