"""Measure compilation at start: the first step with an empty compile cache and with a filled one, each in a fresh process.

    python -m benchmarks.start quickstart --to docs/measurements/cpu/compile.json

A warm start reuses the cache folder of the cold start before it. CPU seconds (of the process and the compilers it starts) are reported
beside wall-clock seconds, which depend on the machine's load. Every process has one compute thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import click

from benchmarks import front
from gptoughts.diagnostics.bench.figures import machine_figures, spread
from gptoughts.errors import LayerError, RunError
from gptoughts.hardware.machine import probe

LAYERS = ("compile-blocks", "compile-model")
CLOCKS = ("clock_seconds", "processor_seconds")
GOAL = 0.2
"""Goal for warm / cold."""


def measure(recipe: str, rounds: int, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure cold and warm first steps of every compile layer, interleaved; `keep` receives the figures after every pair."""
    starts: dict[str, list[dict[str, Any]]] = {}
    found: dict[str, Any] = {}
    for _ in range(rounds):
        for layer in LAYERS:
            with TemporaryDirectory(prefix="gptoughts-start-") as folder:
                for state in ("cold", "warm"):
                    starts.setdefault(f"{layer} {state}", []).append(_started(recipe, layer, folder))
            found = _found(recipe, rounds, starts)
            keep(found)
    return found


def _found(recipe: str, rounds: int, starts: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    medians = {name: {clock: median(row[clock] for row in rows) for clock in CLOCKS} for name, rows in starts.items()}
    layers = [layer for layer in LAYERS if f"{layer} warm" in medians]
    return {
        "what": "seconds of the first step less those of the second, cold and warm, each in a fresh process",
        "command": f"python -m benchmarks.start {recipe} --rounds {rounds}",
        "machine": machine_figures(probe(), 1),
        "goal": f"warm <= {GOAL:.0%} of cold",
        "warm_share_of_cold": {
            layer: {clock: round(medians[f"{layer} warm"][clock] / medians[f"{layer} cold"][clock], 3) for clock in CLOCKS}
            for layer in layers
        },
        "runs": [
            {"variant": name, **{clock: spread([row[clock] for row in rows]) for clock in CLOCKS}, "starts": rows}
            for name, rows in starts.items()
        ],
    }


def _started(recipe: str, layer: str, folder: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.start", recipe, "--one", layer]
    ran = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": folder},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise RunError(f"{' '.join(command)}: exit code {ran.returncode}\n{ran.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return found


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def one(recipe: str, layer: str) -> dict[str, Any]:
    """Return first step minus second step of this process, and where its CPU seconds went."""
    from gptoughts.api import decide
    from gptoughts.diagnostics.bench.training import open_training
    from gptoughts.layers.support.compile import newest
    from gptoughts.models.torch_internals import compile_seconds

    setting = decide(recipe, layers={"compile": layer})
    with open_training(setting) as training:
        took = []
        for _ in range(2):
            began, processor = perf_counter(), _processor_seconds()
            training.steps(1)
            took.append((perf_counter() - began, _processor_seconds() - processor))
        made = newest()
        if made is None or not made.figures["made"] + made.figures["cached"]:
            raise LayerError(f"compile={layer}: no graph was compiled in two steps")
        parts = sorted(compile_seconds().items(), key=lambda row: -row[1])
        return {
            "clock_seconds": took[0][0] - took[1][0],
            "processor_seconds": took[0][1] - took[1][1],
            "graphs": made.figures,
            "compile_times": {name: round(value, 2) for name, value in parts[:12]},
        }


@click.command()
@click.argument("recipe", default="quickstart")
@click.option("--rounds", default=3, type=click.IntRange(1), help="cold and warm starts of each layer")
@click.option("--one", "layer", help="measure one start in this process, print JSON")
@click.option("--to", "out", metavar="FILE", help="write JSON to FILE")
def _command(recipe: str, rounds: int, layer: str | None, out: str | None) -> None:
    """Measure cold and warm starts."""
    if layer:
        print(json.dumps(one(recipe, layer)))
        return

    def keep(found: dict[str, Any]) -> None:
        if out:
            Path(out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    found = measure(recipe, rounds, keep)
    print(json.dumps(found["warm_share_of_cold"], indent=1))


def main(arguments: list[str] | None = None) -> None:
    """Run `python -m benchmarks.start`."""
    front.run(_command, "benchmarks.start", arguments)


if __name__ == "__main__":
    main()
