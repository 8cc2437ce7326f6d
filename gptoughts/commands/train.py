"""`gptoughts train`: decide, put the environment in place, run, and say what came of it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gptoughts.api import Setting, decide, train_setting
from gptoughts.errors import ConfigError

if TYPE_CHECKING:
    from gptoughts.run import Outcome

GUARD = "GPTOUGHTS_ENVIRONMENT_SET"


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
) -> int:
    """Train; returns the exit code: 0, or 128 + the signal that ended the run early."""
    setting = decide(recipe, profile, fields, layers, plugin)
    notes = put_environment_in_place(setting)
    if setting.world.rank == 0:
        print(setting.plan.table(), flush=True)
        for note in notes:
            print(f"note: {note}", flush=True)
    _needs_torch()
    outcome = train_setting(setting, run_name, run_dir, resume, strict)
    if setting.world.rank == 0:
        _report(outcome, recipe, run_name, run_dir)
    return 128 + outcome.stopped_by if outcome.stopped_by else 0


def put_environment_in_place(setting: Setting) -> list[str]:
    """Start this process again with the plan's variables, once. What the user set differently wins and is returned as a note."""
    notes, missing = [], {}
    ours = os.environ.get(GUARD, "").split(",")
    for name, value in setting.plan.environment.items():
        here = os.environ.get(name)
        if here is None:
            missing[name] = value
        elif here != value and name not in ours:
            notes.append(f"{name}={here} was set by you; the plan wanted {value}")
    if missing and GUARD not in os.environ:
        sys.stdout.flush()
        environment = {**os.environ, **missing, GUARD: ",".join(missing)}
        os.execve(sys.executable, [sys.executable, "-m", "gptoughts", *sys.argv[1:]], environment)
    return notes


def _needs_torch() -> None:
    from importlib.util import find_spec

    for package in ("torch", "numpy", "safetensors", "tokenizers"):
        if find_spec(package) is None:
            raise ConfigError(f"training needs the package {package}, not installed\n  try: pip install 'gptoughts[train]'")


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
        print(f"next        gptoughts generate {shlex.quote(str(outcome.checkpoint))} --prompt 'def '")


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
