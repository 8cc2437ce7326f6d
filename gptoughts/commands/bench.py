"""`gptoughts bench`: measure, taking turns, with medians and spread."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from gptoughts.api import decide
from gptoughts.commands.train import needs_torch, put_environment_in_place

SAME_MEASUREMENT = ("what", "recipe", "plan", "model")
"""A run in a file of measurements is replaced by a later one that has these in common with it."""


def step(
    fields: Mapping[str, str],
    layers: Mapping[str, str],
    recipe: str | None,
    profile: str,
    plugin: Sequence[str],
    rounds: int,
    steps: int,
    out: str | None,
) -> int:
    """Compare our loop with a bare one and with float32 eager; print a table and, if asked, keep the figures."""
    setting = decide(recipe, profile, fields, layers, plugin)
    for note in put_environment_in_place(setting):
        print(f"note: {note}", flush=True)
    needs_torch()
    from gptoughts.bench.figures import keep
    from gptoughts.bench.step import bench_step
    from gptoughts.bench.table import step_table

    run = bench_step(setting, rounds, steps, _command(), lambda text: print(text, file=sys.stderr, flush=True))
    print(step_table(run))
    if out is not None:
        keep(Path(out), run, SAME_MEASUREMENT)
        print(f"kept in {out}")
    return 0


def data(source: str, tokenizer: str, out: str | None) -> int:
    """Measure batches and tokenising; print the figures and, if asked, keep them."""
    needs_torch()
    from gptoughts.bench.data import bench_batches, bench_tokenise
    from gptoughts.bench.figures import keep, machine_figures
    from gptoughts.machine import probe

    here = machine_figures(probe())
    measures = (("batches", bench_batches), ("tokenise", partial(bench_tokenise, source, tokenizer)))
    for what, measure in measures:
        figures = measure()
        print(what, *(f"  {name:<34} {value}" for name, value in figures.items()), sep="\n", flush=True)
        if out is not None:
            keep(Path(out), {"what": what, "command": _command(), "machine": here, **figures}, ("what",))
    if out is not None:
        print(f"kept in {out}")
    return 0


def _command() -> str:
    return shlex.join(["gptoughts", *sys.argv[1:]])
