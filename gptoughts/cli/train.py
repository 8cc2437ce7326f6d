"""`gptoughts train`: decide, put the environment in place, run, and say what came of it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from gptoughts.api import ResolvedRun, decide, train_setting
from gptoughts.errors import ConfigError
from gptoughts.planning.environment import Process, lacking, restart

if TYPE_CHECKING:
    from gptoughts.run.run import Outcome


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
) -> int:
    """Train; returns the exit code: 0, or 128 + the signal that ended the run early."""
    setting = decide(recipe, profile, fields, layers, plugin)
    needs_torch()
    put_environment_in_place(setting)
    if setting.world.rank == 0:
        print(setting.plan.table(), flush=True)
    outcome = train_setting(setting, run_name, run_dir, resume, strict, numerics)
    if setting.world.rank == 0:
        _report(outcome, recipe, run_name, run_dir)
    return 128 + outcome.stopped_by if outcome.stopped_by else 0


def put_environment_in_place(setting: ResolvedRun) -> list[str]:
    """Start this process again with the plan's variables, once; in somebody else's process `train_setting` sets them instead.

    Returns the plan's notes, for those who do not print its table.
    """
    context = click.get_current_context(silent=True)
    if context is not None and context.find_root().obj is Process.OURS:
        restart(lacking(setting.plan, os.environ))
    return list(setting.plan.notes)


def needs_torch() -> None:
    """Raise ConfigError, with the line to type, where a package that training needs is not installed."""
    from importlib.util import find_spec

    missing = [package for package in ("torch", "numpy", "safetensors", "tokenizers") if find_spec(package) is None]
    if missing:
        raise ConfigError(f"training needs {', '.join(missing)}, not installed\n  try: pip install 'gptoughts[train]'")


def _report(outcome: Outcome, recipe: str | None, run_name: str | None, run_dir: str | None) -> None:
    place = f"--run-dir {shlex.quote(run_dir)}" if run_dir else f"--run {shlex.quote(outcome.out.name)}"
    if outcome.stopped_by:
        words = shlex.join(_without_place(sys.argv[1:]))
        print(f"stopped at step {outcome.progress.step} and saved; to go on: gptoughts {words} {place}")
        return
    if outcome.val_loss is not None and outcome.unigram_entropy is not None:
        below = outcome.unigram_entropy - outcome.val_loss
        print(
            f"validation loss {outcome.val_loss:.4f} nats per token; unigram entropy of the same tokens "
            f"{outcome.unigram_entropy:.4f}: {abs(below):.4f} {'below' if below >= 0 else 'above'}"
        )
    print(f"run         {outcome.out}  (plan.json, evidence.json, metrics.jsonl, recipe.toml, loss.png)")
    print(f"checkpoint  {outcome.checkpoint or 'none'}")
    if outcome.checkpoint:
        print(f"next        {_next(outcome, shlex.quote(str(outcome.checkpoint)))}")


def _next(outcome: Outcome, checkpoint: str) -> str:
    if outcome.objective == "question-answering":
        return f"gptoughts eval squad {checkpoint}"
    return f"gptoughts generate {checkpoint} --prompt {shlex.quote(outcome.prompt)}"


def _without_place(words: list[str]) -> list[str]:
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in ("--run", "--run-dir"):
            skip = True
        elif not word.startswith(("--run=", "--run-dir=")):
            kept.append(word)
    return kept
