"""`gptoughts bench`: measure, taking turns, with medians and spread."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gptoughts.api import ResolvedRun, decide
from gptoughts.cli.train import needs_torch
from gptoughts.diagnostics.bench.variants import Ask
from gptoughts.errors import ConfigError, LayerError

SAME_MEASUREMENT = ("what", "recipe", "plan", "model")
"""A run in a file of measurements is replaced by a later one that has these in common with it."""


def layers(
    fields: Mapping[str, str],
    layers: Mapping[str, str],
    recipe: str | None,
    profile: str,
    plugin: Sequence[str],
    rounds: int,
    steps: int,
    out: str | None,
) -> int:
    """Measure every layer of the plan alone; print the tables and, if asked, keep figures, Markdown and picture.

    Returns 3 where the plan or the baseline could not be measured, so that no gain means anything.
    """
    setting, ask = _asked(recipe, profile, fields, layers, plugin)
    from gptoughts.diagnostics.bench.figures import keep
    from gptoughts.diagnostics.bench.layers import bench_layers
    from gptoughts.diagnostics.bench.layers_table import layers_markdown, layers_text
    from gptoughts.diagnostics.bench.picture import draw_layers
    from gptoughts.diagnostics.bench.text import write_text

    path = _target(out)
    run = bench_layers(setting, ask, rounds, steps, _command(), _progress)
    print(layers_text(run))
    if path is not None:
        runs = keep(path, run, SAME_MEASUREMENT)
        draw_layers(runs, path.with_suffix(".png"))
        write_text(path.with_suffix(".md"), layers_markdown(runs, path.with_suffix(".png").name))
        _say_kept(path, ".md", ".png")
    return 0 if run["whole"]["measured"] else LayerError.exit_code


def parity(
    fields: Mapping[str, str],
    layers: Mapping[str, str],
    recipe: str | None,
    profile: str,
    plugin: Sequence[str],
    steps: int,
    seeds: int,
    slots: str | None,
    out: str | None,
) -> int:
    """Train the plan and its reference alike and compare their losses. Returns 1 where they differ by more than the limit."""
    setting, ask = _asked(recipe, profile, fields, layers, plugin)
    from gptoughts.diagnostics.bench.figures import keep
    from gptoughts.diagnostics.bench.parity import bench_parity
    from gptoughts.diagnostics.bench.parity_table import parity_markdown, parity_text
    from gptoughts.diagnostics.bench.picture import draw_parity
    from gptoughts.diagnostics.bench.text import write_text

    named = [slot.strip().replace("-", "_") for slot in slots.split(",")] if slots else []
    path = _target(out)
    run = bench_parity(setting, ask, steps=steps, seeds=seeds, named=named, command=_command(), say=_progress)
    print(parity_text(run))
    if path is not None:
        runs = keep(path, run, (*SAME_MEASUREMENT, "in_question"))
        draw_parity(run, path.with_suffix(".png"))
        write_text(path.with_suffix(".md"), parity_markdown(runs, path.with_suffix(".png").name))
        _say_kept(path, ".md", ".png")
    return 0 if run["passed"] else 1


def gemm(largest: int | None, out: str | None) -> int:
    """Measure products and copies, keep the best of each in the user's cache, and print them beside the datasheet."""
    needs_torch()
    from gptoughts.diagnostics.bench.figures import keep
    from gptoughts.diagnostics.bench.gemm import bench_gemm, ceilings_of, effort_for, gemm_markdown, gemm_text
    from gptoughts.diagnostics.bench.text import write_text
    from gptoughts.hardware.machine import probe
    from gptoughts.hardware.measured_peaks import keep_ceilings

    here, path = probe(), _target(out)
    run = bench_gemm(here, _command(), _progress, effort_for(here, largest))
    print(gemm_text(run))
    if largest is None:  # small matrices reach no ceiling
        print(f"kept in {keep_ceilings(here, ceilings_of(run))}")
    if path is not None:
        runs = keep(path, run, ("what", "device"))
        write_text(path.with_suffix(".md"), gemm_markdown(runs))
        _say_kept(path, ".md")
    return 0


def _asked(
    recipe: str | None, profile: str, fields: Mapping[str, str], layers: Mapping[str, str], plugin: Sequence[str]
) -> tuple[ResolvedRun, Ask]:
    """What was asked for, decided here and to be decided again in other processes; this one needs none of the plan's variables."""
    setting = decide(recipe, profile, fields, layers, plugin)
    needs_torch()
    for note in setting.plan.notes:
        print(f"note: {note}", flush=True)
    return setting, Ask(recipe, profile, fields, tuple(plugin))


def _target(out: str | None) -> Path | None:
    """The file that figures go to, looked at before anything is measured. Raises ConfigError where it cannot take them."""
    if out is None:
        return None
    from gptoughts.diagnostics.bench.figures import refuse_unwritable

    path = Path(out)
    if path.suffix != ".json":
        raise ConfigError(
            f"--to {out}: needs a name that ends in .json: measurements are JSON\n  try: --to {path.with_suffix('.json')}"
        )
    refuse_unwritable(path)
    return path


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_kept(path: Path, *others: str) -> None:
    print(f"kept in {', '.join(str(path.with_suffix(end)) for end in (path.suffix, *others))}")


def _command() -> str:
    return shlex.join(["gptoughts", *sys.argv[1:]])
