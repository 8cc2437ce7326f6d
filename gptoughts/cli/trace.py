"""`gptoughts trace`: profile a few training steps and report where their time goes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from gptoughts.api import ResolvedRun, decide
from gptoughts.cli.train import apply_environment, require_torch
from gptoughts.console import print_result
from gptoughts.errors import ConfigError

SETTLE_STEPS = 2
"""Steps after the layers' warm-up before the first traced one, by default."""
TRACED_STEPS = 3


def trace(
    recipe: str | None,
    profile: str,
    fields: Mapping[str, str],
    layers: Mapping[str, str],
    plugin: Sequence[str],
    first: int | None,
    last: int | None,
    run_name: str | None,
    run_dir: str | None,
    memory_history: bool,
) -> int:
    """Write trace.json.gz, trace.md, trace.summary.json and trace.png into the run folder; print the summary."""
    setting = decide(recipe, profile, fields, layers, plugin)
    require_torch()
    first, last = steps_to_trace(setting, first, last)
    apply_environment(setting)
    from gptoughts.diagnostics.trace import describe, record
    from gptoughts.run.tracking.run_dir import run_folder

    name = run_name or f"{setting.resolved.recipe.name}-trace-{time.strftime('%Y%m%d-%H%M%S')}"
    out: Path = run_folder(name, run_dir).out
    print_result(setting.plan.table())
    print_result(f"tracing steps {first} to {last}")
    record(setting, first, last, out, memory_history)
    print_result(describe(out, f"{name}: steps {first} to {last} on {setting.plan.machine}"))
    return 0


def steps_to_trace(setting: ResolvedRun, first: int | None, last: int | None) -> tuple[int, int]:
    """Return the first and last step to trace; by default those after the warm-up. Raises ConfigError for an invalid range."""
    if setting.world.world_size > 1:
        raise ConfigError(
            "trace: runs in one process", found=f"{setting.world.world_size} ranks", fix="start it without torchrun"
        )
    length = setting.resolved.recipe.train.steps
    warmup = max(setting.extensions.catalog[choice.layer].warmup_steps for choice in setting.plan.choices)
    begin = first if first is not None else warmup + SETTLE_STEPS + 1
    if first is None and last is not None:
        begin = min(begin, last)
    end = last if last is not None else begin + TRACED_STEPS - 1
    if length is not None:
        given = [f"--{word} {value}" for word, value in (("from", first), ("to", last)) if value is not None and value > length]
        if given:
            raise ConfigError(
                f"{', '.join(given)}: beyond the last step", found=f"{length} steps", fix=f"--train.steps {max(begin, end)}"
            )
        begin, end = min(begin, length), min(end, length)
    if begin > end:
        raise ConfigError(f"--from {begin} --to {end}: the range is empty")
    return begin, end
