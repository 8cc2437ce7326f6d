"""`gptoughts train`: plan, set environment variables, run, and print the result."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from gptoughts.api import ResolvedRun, check_collectives, decide, train_resolved
from gptoughts.cli.ending import signals_held
from gptoughts.config.tasks import TASKS, Task
from gptoughts.console import print_line
from gptoughts.errors import ConfigError
from gptoughts.hardware.world import world_from_environment
from gptoughts.planning.environment import Process, missing_variables, restart
from gptoughts.processes import process_began

if TYPE_CHECKING:
    from gptoughts.run.result import RunResult

PLACES = ("--name", "--run", "--run-dir", "--run_dir")
"""Flags that say where a run is."""


def train(
    recipe: str | None,
    profile: str,
    fields: Mapping[str, str],
    layers: Mapping[str, str],
    plugin: Sequence[str],
    run_name: str | None,
    run_dir: str | None,
    resume: str,
    strict: bool,
    numerics: str,
    ranks: int | None,
    gpus: int | None,
    collectives: str,
) -> int:
    """Train, in one process per GPU. Returns the exit code: 0, or 128 + the signal that ended the run early."""
    setting = decide(recipe, profile, fields, layers, plugin, ranks=ranks, gpus=gpus, every_gpu=True)
    require_torch()
    check_collectives(collectives, setting)
    if setting.world.world_size > 1 and not world_from_environment(os.environ).launched:
        return _launch(setting, ranks, run_name or run_dir)
    apply_environment(setting)
    if setting.world.rank == 0:
        print_line(setting.plan.table())
    job: dict[str, Any] = {"strict": strict, "numerics": numerics, "collectives": collectives}
    if _owns_process():
        job["began"] = process_began()
    result = train_resolved(setting, run_name, run_dir, resume=resume, **job)
    if setting.world.rank == 0:
        _report(result, recipe, run_name, run_dir)
    return 128 + result.stopped_by if result.stopped_by else 0


def _launch(setting: ResolvedRun, ranks: int | None, place: str | None) -> int:
    """Start the ranks on this machine. What their plans have in common was checked by making one here."""
    from gptoughts.cli.launch import launch

    world = setting.world
    if not world.on_one_machine:
        raise ConfigError(
            f"--ranks: more than the {world.local_world_size} GPUs of this machine",
            found=ranks,
            fix=f"--ranks {world.local_world_size}, or torchrun or srun on every machine",
        )
    return launch(world.world_size, given_words(), setting.plan.environment, place is not None)


def given_words() -> list[str]:
    """Return the words of this command line, which is another program's if it called `main`."""
    context = click.get_current_context(silent=True)
    return list(context.meta["gptoughts.words"]) if context is not None else sys.argv[1:]


def _owns_process() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and context.find_root().obj is Process.OURS


def apply_environment(setting: ResolvedRun) -> list[str]:
    """Re-execute this process once with the plan's environment variables; inside another program `train_resolved` sets them instead.

    Returns the plan's notes, for commands that do not print its table.
    """
    if _owns_process():
        with signals_held():
            restart(missing_variables(setting.plan, os.environ))
    return list(setting.plan.notes)


def require_torch() -> None:
    """Raise ConfigError if a package that training needs is not installed."""
    from importlib.util import find_spec

    missing = [package for package in ("torch", "numpy", "safetensors", "tokenizers") if find_spec(package) is None]
    if missing:
        raise ConfigError(f"train: packages not installed: {', '.join(missing)}", fix="pip install 'gptoughts[train]'")


def _report(result: RunResult, recipe: str | None, run_name: str | None, run_dir: str | None) -> None:
    place = f"--run-dir {shlex.quote(run_dir)}" if run_dir else f"--name {shlex.quote(result.out.name)}"
    if result.stopped_by:
        words = shlex.join(_without_place(given_words()))
        print_line(f"interrupted at step {result.progress.step}, checkpoint saved. Resume with: gptoughts {words} {place}")
        return
    if result.val_loss is not None and result.unigram_entropy is not None:
        below = result.unigram_entropy - result.val_loss
        print_line(
            f"validation loss {result.val_loss:.4f} nats per token; unigram entropy of the same tokens "
            f"{result.unigram_entropy:.4f}: {abs(below):.4f} {'below' if below >= 0 else 'above'}"
        )
    print_line(f"run         {result.out}  (plan.json, evidence.json, metrics.jsonl, recipe.toml, loss.png)")
    print_line(f"checkpoint  {result.checkpoint or 'none'}")
    if result.checkpoint:
        print_line(f"next        {_next(result, shlex.quote(str(result.checkpoint)))}")


def _next(result: RunResult, checkpoint: str) -> str:
    task = TASKS.get(result.objective, Task())
    if not task.samples:
        return f"gptoughts eval {task.evaluation} {checkpoint}"
    return f"gptoughts generate {checkpoint} --prompt {shlex.quote(result.prompt)}"


def _without_place(words: list[str]) -> list[str]:
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in PLACES:
            skip = True
        elif not word.startswith(tuple(f"{place}=" for place in PLACES)):
            kept.append(word)
    return kept
