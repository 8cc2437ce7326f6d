"""`gptoughts verify-resume`: train, kill and resume on this machine, and compare with a training that was not killed, bit for bit."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from gptoughts.api import decide
from gptoughts.cli.train import require_torch
from gptoughts.config.recipe import LENGTHS
from gptoughts.console import print_line, print_result
from gptoughts.errors import ConfigError
from gptoughts.hardware.world import world_from_environment


def verify_resume(
    recipe: str | None,
    profile: str,
    fields: Mapping[str, str],
    layers: Mapping[str, str],
    plugin: Sequence[str],
    before: int,
    after: int,
    numerics: str,
    ranks: int | None,
    gpus: int | None,
    run_dir: str | None,
) -> int:
    """Print whether a killed and resumed training is exact, and the cause if it is not. Returns 0, or 1 if it is not exact."""
    if world_from_environment(os.environ).launched:
        raise ConfigError(
            "verify-resume: starts its own ranks, and was started by a launcher", fix="gptoughts verify-resume --ranks N"
        )
    setting = decide(recipe, profile, fields, layers, plugin, ranks=ranks, gpus=gpus, every_gpu=True)
    require_torch()
    from gptoughts.diagnostics.resume_check import Trial, find_cause, verify

    lengths = {f"train.{length}" for length in LENGTHS}
    words = [setting.resolved.recipe.name] if recipe is None else [recipe]
    words += [f"--profile={profile}", f"--numerics={numerics}", *(f"--plugin={path}" for path in plugin)]
    words += [f"--{key.replace('_', '-')}={value}" for key, value in fields.items() if key not in lengths]
    words += [f"--{name}={value}" for name, value in (("ranks", ranks), ("gpus", gpus)) if value is not None]
    folder = _folder(run_dir)
    trial = Trial(tuple(words), layers, before, after, folder)
    claimed = setting.plan.not_repeatable
    if claimed:
        print_result(f"note: the plan does not promise equal bits, because of {', '.join(claimed)}")
    done = False
    try:
        difference, unbroken = verify(trial, _say)
        if not difference.lines:
            print_result(
                f"exact: {difference.losses} metrics of {trial.steps} steps and {difference.files} files of tensors are equal, bit for bit"
            )
            done = True
            return 0
        print_result("\n  ".join(["not exact:", *difference.lines]))
        print_result(find_cause(trial, setting, unbroken, _say))
        print_result(f"the trainings stay in {folder}")
        return 1
    except (SystemExit, KeyboardInterrupt):  # a signal: the trainings are incomplete
        done = True
        raise
    finally:
        if done and run_dir is None:
            shutil.rmtree(folder, ignore_errors=True)


def _folder(run_dir: str | None) -> Path:
    """Return an empty folder for the trainings: `run_dir`, or a new one in out/. Raises ConfigError."""
    try:
        if run_dir is None:
            Path("out").mkdir(exist_ok=True)
            return Path(tempfile.mkdtemp(prefix="verify-resume-", dir="out"))
        folder = Path(run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"--run-dir {folder}: not empty", fix="--run-dir with a new folder")
    except OSError as error:
        raise ConfigError(
            f"--run-dir: {error.filename} cannot be made ({error.strerror})", fix="--run-dir DIR on another disk"
        ) from None
    return folder


def _say(text: str) -> None:
    print_line(text, sys.stderr)
