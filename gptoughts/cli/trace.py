"""`gptoughts trace`: train a few steps as `train` would, under torch's profiler, and say where their time went."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from gptoughts.api import ResolvedRun, decide
from gptoughts.cli.train import needs_torch, put_environment_in_place
from gptoughts.errors import ConfigError, RunError

SETTLING = 2
"""Steps after the layers' own warm ones before the first that is traced if nobody says which."""
TRACED = 3


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
    """Write trace.json.gz, trace.md, trace.summary.json and trace.png into the run's folder; print the summary."""
    setting = decide(recipe, profile, fields, layers, plugin)
    needs_torch()
    first, last = steps_to_trace(setting, first, last)
    put_environment_in_place(setting)
    from gptoughts.run.tracking.run_dir import run_folder

    name = run_name or f"{setting.resolved.recipe.name}-trace-{time.strftime('%Y%m%d-%H%M%S')}"
    out = run_folder(name, run_dir).out
    print(setting.plan.table(), flush=True)
    print(f"steps {first} to {last} are traced", flush=True)
    _trained(setting, first, last, out, memory_history)
    print(_described(out, f"{name}: steps {first} to {last} on {setting.plan.machine}"))
    return 0


def steps_to_trace(setting: ResolvedRun, first: int | None, last: int | None) -> tuple[int, int]:
    """The steps to trace, those that nobody named chosen after the warm ones. Raises ConfigError where they cannot be."""
    if setting.world.world_size > 1:
        raise ConfigError("trace runs in one process; start it without torchrun")
    length = setting.resolved.recipe.train.steps
    warm = max(setting.extensions.catalog[choice.layer].warmup_steps for choice in setting.plan.choices)
    wanted = first if first is not None else warm + SETTLING + 1
    if first is None and last is not None:
        wanted = min(wanted, last)
    end = last if last is not None else wanted + TRACED - 1
    if length is not None:
        given = [f"--{word} {value}" for word, value in (("from", first), ("to", last)) if value is not None and value > length]
        if given:
            raise ConfigError(f"{', '.join(given)}: the run has {length} steps\n  try: --train.steps {max(wanted, end)}")
        wanted, end = min(wanted, length), min(end, length)
    if wanted > end:
        raise ConfigError(f"--from {wanted} --to {end}: the first step to trace comes after the last")
    return wanted, end


def _trained(setting: ResolvedRun, first: int, last: int, out: Path, memory_history: bool) -> None:
    """Train to `last` and write the trace. Raises RunError where the GPU's memory ran out, with what lay in it."""
    import torch

    from gptoughts.diagnostics import trace as tracing
    from gptoughts.diagnostics.bench.training import opened_training
    from gptoughts.engine.trainer import advance
    from gptoughts.run.memory_snapshot import history, memory_report

    out.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as stack:
            if memory_history:
                if not setting.machine.gpus:
                    print("note: --memory-history: there is no GPU whose allocator could record anything", flush=True)
                stack.enter_context(history(torch.device("cuda" if setting.machine.gpus else "cpu")))
            training = stack.enter_context(opened_training(setting))
            engine = training.engine
            training.steps(first - 1)
            engine.model.train()
            with tracing.phases_named(engine), tracing.recorded(engine.device, out / "trace.json.gz"):
                for number in range(first, last + 1):
                    with tracing.step_named(number):
                        training.progress, _ = advance(engine, training.progress, training.rate)
                        if number == last:
                            engine.synchronize()
    except torch.OutOfMemoryError as error:
        said = memory_report(out / "memory.json")
        raise RunError(f"{str(error).partition('. ')[0]}\n{said}\n  try: a smaller --layer.microbatch.sequences") from None


def _described(out: Path, title: str) -> str:
    """Write the summary beside the trace; the text of it."""
    from gptoughts.diagnostics import trace as tracing

    summary = tracing.summarize(tracing.read(out / "trace.json.gz"))
    text = summary.markdown(title)
    (out / "trace.md").write_text(text, encoding="utf-8")
    (out / "trace.summary.json").write_text(
        json.dumps({"title": title, **summary.to_json()}, indent=1) + "\n", encoding="utf-8"
    )
    tracing.draw(summary, out / "trace.png", title)
    return f"{text}\ntrace       {out}  (trace.json.gz for perfetto.dev, trace.md, trace.summary.json, trace.png)"
