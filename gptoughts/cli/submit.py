"""`gptoughts launch slurm|mpi|torchrun RECIPE`: write and submit a job file, or print and start the command of another launcher."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptoughts.config.loader import load
from gptoughts.config.site import SlurmSite, read_site
from gptoughts.console import print_result, redacted
from gptoughts.errors import ConfigError
from gptoughts.files import write_text
from gptoughts.processes import module_words

TEXT = """#!/usr/bin/env bash
{directives}
# Saves {save} s before the time limit; the job is requeued and the same command resumes the run.
set -euo pipefail

{setup}
export MASTER_ADDR="${{MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)}}"
export MASTER_PORT="${{MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}}"
[ -z "${{SLURM_CPUS_PER_TASK:-}}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

step='' time_is_up=''
trap 'time_is_up=yes; [ -z "$step" ] || kill -USR1 "$step" || true' USR1 # srun passes it on to every rank
# --wait: ranks that still run 60 s after the first one ended are ended too
srun --wait=60 --ntasks-per-node {ranks} \\
    {train} </dev/null &
step=$! code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # a signal interrupts wait
    code=0
    wait "$step" || code=$?
done
# 138: ended by SIGUSR1 with a checkpoint; 75: out of memory, the smaller micro-batch is saved
if [ "$code" -eq 138 ] || [ "$code" -eq 75 ] || {{ [ -n "$time_is_up" ] && [ "$code" -ne 0 ]; }}; then
    [ "${{SLURM_RESTART_COUNT:-0}}" -ge 100 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
"""A job file."""


def slurm(
    recipe: str | None,
    profile: str,
    fields: Mapping[str, str],
    layers: Mapping[str, str],
    plugin: Sequence[str],
    name: str | None,
    site: str | None,
    out: str | None,
    submit: bool,
    dry_run: bool,
    **given: Any,
) -> int:
    """Write the job file; with `submit` also submit it, with `dry_run` print it instead."""
    loaded = load(recipe, fields) if recipe else None
    settings = read_site(recipe, site, {key: value for key, value in given.items() if value is not None})
    if name is not None and not name.isprintable():
        raise ConfigError("--name: must be one line", found=repr(name))
    name = name or f"{loaded.recipe.name if loaded else 'gptoughts'}-{time.strftime('%Y%m%d-%H%M%S')}"
    words = _train_words(recipe, profile, fields, layers, plugin)
    text = job_file(settings, name, [*words, "--name", name])
    secret = next((line for line in text.splitlines() if redacted(line) != line), None)
    if secret is not None:
        raise ConfigError(
            "launch slurm: the job file would hold a secret", found=redacted(secret),
            fix="leave it in the environment, which sbatch passes on",
        )  # fmt: skip
    if dry_run:
        print_result(text, end="", raw=True)
        return 0
    path = Path(out) if out else Path("logs") / f"{name}.sbatch"
    try:
        Path("logs").mkdir(exist_ok=True)  # SLURM does not make the folder of the output
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise ConfigError(f"--to {path}: cannot be written ({error.strerror})", fix="--to FILE in a folder of yours") from None
    print_result(f"job file    {path}")
    if not submit:
        print_result(f"next        sbatch {shlex.quote(str(path))}")
        return 0
    _require("sbatch")
    return subprocess.run(["sbatch", str(path)], check=False).returncode


def job_file(site: SlurmSite, name: str, words: Sequence[str]) -> str:
    """Return a job file that runs `gptoughts` with `words` in one rank per GPU or task."""
    options = {
        "job-name": name, "partition": site.partition, "account": site.account, "qos": site.qos, "constraint": site.constraint,
        "time": site.time, "nodes": site.nodes, "ntasks-per-node": site.ranks_per_node, "gpus-per-node": site.gpus_per_node or None,
        "cpus-per-task": site.cpus_per_task, "output": "logs/%x_%j.out", "error": "logs/%x_%j.err", "open-mode": "append",
        "signal": f"B:USR1@{site.save_seconds}",
    }  # fmt: skip
    lines = [
        f"--{key}={shlex.quote(str(value)) if key == 'job-name' else value}"
        for key, value in options.items()
        if value is not None
    ]
    setup = [f"module load {shlex.join(site.modules)}"] if site.modules else []
    setup += [f". {shlex.quote(site.environment)}"] if site.environment else []
    first, *flags = module_words("gptoughts")
    python = "python" if site.environment else shlex.quote(first)
    return TEXT.format(
        directives="\n".join(f"#SBATCH {line}" for line in [*lines, "--requeue", *site.options]),
        save=site.save_seconds,
        setup="\n".join([*setup, f"cd {shlex.quote(str(Path.cwd()))}"]),
        ranks=site.ranks_per_node,
        train=f"{python} {shlex.join([*flags, *words])}",
    )


def mpi(ranks: int, submit: bool, dry_run: bool, hostfile: str | None, **training: Any) -> int:
    """Print the mpirun command; with `submit` replace this process by it."""
    words = ["mpirun", "-np", str(ranks), "--bind-to", "none", *(["--hostfile", hostfile] if hostfile else [])]
    return _print_or_start([*words, *module_words("gptoughts"), *_training(training)], submit and not dry_run)


def torchrun(ranks: int, submit: bool, dry_run: bool, **training: Any) -> int:
    """Print the command that starts ranks on this machine with torchrun's launcher; with `submit` replace this process by it.

    It is `gptoughts train --ranks N`: `torchrun --standalone` itself listens on all addresses of the machine.
    """
    words = [*module_words("gptoughts"), *_training(training), "--ranks", str(ranks)]
    return _print_or_start(words, submit and not dry_run)


def _training(given: Mapping[str, Any]) -> list[str]:
    if given["recipe"]:
        load(given["recipe"], given["fields"])
    words = _train_words(given["recipe"], given["profile"], given["fields"], given["layers"], given["plugin"])
    return [*words, *(["--name", given["name"]] if given["name"] else [])]


def _print_or_start(words: list[str], start: bool) -> int:
    print_result(redacted(shlex.join(words)), raw=True)
    if start:
        _require(words[0])
        os.execvp(words[0], words)
    return 0


def _require(program: str) -> None:
    if shutil.which(program) is None:
        raise ConfigError(f"{program}: not found on this machine", fix="--dry-run, or a login node of the cluster")


def _train_words(
    recipe: str | None, profile: str, fields: Mapping[str, str], layers: Mapping[str, str], plugin: Sequence[str]
) -> list[str]:
    """Return the words of `gptoughts train` for parsed parameters."""
    words = ["train", *([recipe] if recipe else [])]
    words += ["--profile", profile] if profile != "auto" else []
    for file in plugin:
        words += ["--plugin", file]
    for prefix, values in (("--", fields), ("--layer.", layers)):
        for key, value in values.items():
            words += [f"{prefix}{key.replace('_', '-')}", str(value)]
    return words
