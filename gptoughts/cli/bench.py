"""`gptoughts bench`: run interleaved benchmarks, print medians and spread, optionally write files."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from gptoughts.api import ResolvedRun, decide
from gptoughts.cli.train import require_torch
from gptoughts.console import print_line, print_result, redacted
from gptoughts.diagnostics.bench.variants import RunRequest
from gptoughts.errors import ConfigError, LayerError

SAME_MEASUREMENT = ("what", "recipe", "plan", "model")
"""A later run replaces the one in the file that agrees in these keys."""


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
    """Measure the gain of every layer of the plan; print tables and write JSON, Markdown and a picture to `out`.

    Returns 3 if the plan or the baseline could not be measured, because no gain is valid then.
    """
    setting, ask = _resolve(recipe, profile, fields, layers, plugin)
    from gptoughts.diagnostics.bench.figures import keep
    from gptoughts.diagnostics.bench.layers import bench_layers
    from gptoughts.diagnostics.bench.layers_table import layers_markdown, layers_text
    from gptoughts.diagnostics.bench.picture import draw_layers
    from gptoughts.files import write_text

    path = _target(out)
    run = bench_layers(setting, ask, rounds, steps, _command(), _progress)
    print_result(layers_text(run))
    if path is not None:
        runs = keep(path, run, SAME_MEASUREMENT)
        draw_layers(runs, path.with_suffix(".png"))
        write_text(path.with_suffix(".md"), layers_markdown(runs, path.with_suffix(".png").name))
        _print_kept(path, ".md", ".png")
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
    """Train the plan and its reference and compare their losses. Returns 1 if they differ by more than the limit."""
    setting, ask = _resolve(recipe, profile, fields, layers, plugin)
    from gptoughts.diagnostics.bench.figures import keep
    from gptoughts.diagnostics.bench.parity import bench_parity
    from gptoughts.diagnostics.bench.parity_table import parity_markdown, parity_text
    from gptoughts.diagnostics.bench.picture import draw_parity
    from gptoughts.files import write_text

    named = [slot.strip().replace("-", "_") for slot in slots.split(",")] if slots else []
    path = _target(out)
    run = bench_parity(setting, ask, steps=steps, seeds=seeds, named=named, command=_command(), say=_progress)
    print_result(parity_text(run))
    if path is not None:
        runs = keep(path, run, (*SAME_MEASUREMENT, "in_question"))
        draw_parity(run, path.with_suffix(".png"))
        write_text(path.with_suffix(".md"), parity_markdown(runs, path.with_suffix(".png").name))
        _print_kept(path, ".md", ".png")
    return 0 if run["passed"] else 1


def scaling(
    fields: Mapping[str, str],
    layers: Mapping[str, str],
    recipe: str | None,
    profile: str,
    plugin: Sequence[str],
    ranks: str | None,
    strategies: str | None,
    only: str | None,
    threads: int | None,
    rounds: int,
    steps: int,
    out: str | None,
) -> int:
    """Measure strong and weak scaling. Returns 3 if the single process or every other run could not be measured."""
    from gptoughts.diagnostics.bench.scaling_arms import STRONG, WEAK, request_of, split_layers

    layers, options = split_layers(layers)
    setting, ask = _resolve(recipe, profile, fields, layers, plugin)
    request = request_of(setting, ranks, strategies, options, threads, (only,) if only else (STRONG, WEAK))
    path = _target(out)
    if ranks is not None and "1" not in [word.strip() for word in ranks.split(",")]:
        print_result("note: --ranks without 1: the single process is measured too, as the base")
    from gptoughts.diagnostics.bench.figures import keep
    from gptoughts.diagnostics.bench.picture import draw_scaling
    from gptoughts.diagnostics.bench.scaling import bench_scaling
    from gptoughts.diagnostics.bench.scaling_table import scaling_csv, scaling_markdown, scaling_text
    from gptoughts.files import write_text

    run = bench_scaling(setting, ask, request, rounds=rounds, steps=steps, command=_command(), say=_progress)
    print_result(scaling_text(run))
    if path is not None:
        runs = keep(path, run, (*SAME_MEASUREMENT, "threads_per_rank"))
        draw_scaling(run, path.with_suffix(".png"))
        write_text(path.with_suffix(".csv"), scaling_csv(runs))
        write_text(path.with_suffix(".md"), scaling_markdown(runs, path.with_suffix(".png").name))
        _print_kept(path, ".md", ".csv", ".png")
    return 0 if any("speed_up" in row and row["ranks"] > 1 for row in run["arms"].values()) else LayerError.exit_code


def gemm(largest: int | None, out: str | None) -> int:
    """Measure matrix products and copies, keep the best in the user's cache, and print them beside the datasheet values."""
    require_torch()
    from gptoughts.diagnostics.bench.figures import keep
    from gptoughts.diagnostics.bench.gemm import bench_gemm, effort_for, gemm_markdown, gemm_text, measured_peaks_of
    from gptoughts.files import write_text
    from gptoughts.hardware.machine import probe
    from gptoughts.hardware.measured_peaks import save_measured_peaks

    here, path = probe(), _target(out)
    run = bench_gemm(here, _command(), _progress, effort_for(here, largest))
    print_result(gemm_text(run))
    if largest is None:  # small matrices do not reach the peak
        print_result(f"kept in {save_measured_peaks(here, measured_peaks_of(run))}")
    if path is not None:
        runs = keep(path, run, ("what", "device"))
        write_text(path.with_suffix(".md"), gemm_markdown(runs))
        _print_kept(path, ".md")
    return 0


def _resolve(
    recipe: str | None, profile: str, fields: Mapping[str, str], layers: Mapping[str, str], plugin: Sequence[str]
) -> tuple[ResolvedRun, RunRequest]:
    """Resolve the run here, and return its inputs for the child processes. This process needs no variables of the plan."""
    setting = decide(recipe, profile, fields, layers, plugin)
    require_torch()
    for note in setting.plan.notes:
        print_result(f"note: {note}")
    return setting, RunRequest(recipe, profile, fields, tuple(plugin))


def _target(out: str | None) -> Path | None:
    """Check the output file before anything is measured. Raises ConfigError if it is not a writable .json file."""
    if out is None:
        return None
    from gptoughts.diagnostics.bench.figures import refuse_unwritable

    path = Path(out)
    if path.suffix != ".json":
        raise ConfigError(f"--to {out}: name must end in .json", fix=f"--to {path.with_suffix('.json')}")
    refuse_unwritable(path)
    return path


def _progress(text: str) -> None:
    print_line(text, sys.stderr)


def _print_kept(path: Path, *others: str) -> None:
    print_result(f"kept in {', '.join(str(path.with_suffix(end)) for end in (path.suffix, *others))}")


def _command() -> str:
    return str(redacted(shlex.join(["gptoughts", *sys.argv[1:]])))
