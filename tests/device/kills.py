"""Kills a training run at random times, goes on each time, and compares what it reaches with a run that nobody killed, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.device.kept import Deadline, Kept, folder
from tests.device.turns import Broken, Job, environment_of, flags

KILLS = 20
FIELDS = {
    "data.tokenizer": "bytes", "train.global_batch": "32", "eval.every": "0", "log.every": "1", "save.every": "20",
    "train.steps": "3000", "sample.tokens": "1",
}  # fmt: skip
TINY = {
    "model.depth": "1", "model.width": "32", "model.heads": "2", "data.sequence_length": "32", "train.global_batch": "4",
    "train.steps": "400",
}  # fmt: skip
STILL = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
LONGEST_START = 120.0


def run_kills(kept: Kept, deadline: Deadline, tiny: bool) -> int:
    """20 kills, then to the end, beside a run that was left alone. Goes on where an earlier start stopped; 1 while it is not done."""
    if kept.holds("kills"):
        return 0
    if not deadline.allows(5 if tiny else 60):
        print(f"kills: not begun, {deadline.left():.0f} s left", flush=True)
        return 1
    fields = {**FIELDS, **(TINY if tiny else {})}
    layers = {"compile": "eager"} if tiny else {}
    job = Job("kills", "quickstart", fields, layers, environment=STILL)
    place = folder() / f"kills{'-tiny' if tiny else ''}"
    wanted = 2 if tiny else KILLS
    try:
        variables = {**environment_of(job, deadline), **STILL}
        told = _state(place)
        while told["kills"] < wanted:
            told["kills"] += _killed_once(job, place / "killed", variables, told["kills"], deadline)
            (place / "state.json").write_text(json.dumps(told), encoding="utf-8")
            print(f"kills: {told['kills']} of {wanted}, step {_step(place / 'killed')}", flush=True)
        _to_the_end(job, place / "killed", variables, deadline)
        _to_the_end(job, place / "alone", variables, deadline)
    except Broken as error:
        kept.keep_failure("kills", str(error))
        print(f"kills: {error}", flush=True)
        return 1
    figures = compared(place / "killed", place / "alone")
    kept.keep("kills", {"command": job.command(), "kills": wanted, **figures})
    print(json.dumps({"kills": wanted, **{key: figures[key] for key in ("bit_for_bit", "differ")}}), flush=True)
    shutil.rmtree(place)
    return 0 if figures["bit_for_bit"] else 1


def _state(place: Path) -> dict[str, Any]:
    place.mkdir(parents=True, exist_ok=True)
    path = place / "state.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {"kills": 0}


def _command(job: Job, where: Path) -> list[str]:
    words = ["train", job.recipe, *flags(job.fields, job.layers), "--run-dir", str(where), "--resume", "auto"]
    return [sys.executable, "-m", "tests.device.still", *words]


def _start(job: Job, where: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    where.parent.mkdir(parents=True, exist_ok=True)
    with where.with_suffix(".log").open("ab") as log:
        environment = {**os.environ, **variables}
        return subprocess.Popen(_command(job, where), stdout=log, stderr=log, env=environment)


def _step(where: Path) -> int:
    """The last step that the run has logged, 0 before the first."""
    path = where / "metrics.jsonl"
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):  # a line that the kill cut short
            continue
    return 0


def _killed_once(job: Job, where: Path, variables: dict[str, str], number: int, deadline: Deadline) -> int:
    """One life. Three of four end some time after the first new step, the fourth some time after its start, wherever that is."""
    chance = random.Random(number)
    rows, began = _rows(where), time.monotonic()
    process = _start(job, where, variables)
    try:
        early = number % 4 == 3
        wait = chance.uniform(0.5, 12.0) if early else chance.uniform(0.0, 1.2)
        while not early and _rows(where) <= rows:
            _still_running(process, where)
            if time.monotonic() - began > min(LONGEST_START, deadline.left()):
                raise Broken(f"no step after {time.monotonic() - began:.0f} s\n{_tail(where)}")
            time.sleep(0.05)
        ends = time.monotonic() + wait
        while time.monotonic() < ends and process.poll() is None:
            time.sleep(0.02)
        if process.poll() is not None and process.returncode:
            raise Broken(f"exit code {process.returncode}\n{_tail(where)}")
        return 1 if process.poll() is None else _finished(where)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


def _finished(where: Path) -> int:
    raise Broken(f"the run ended before it was killed often enough, at step {_step(where)}: give it more steps")


def _rows(where: Path) -> int:
    path = where / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def _still_running(process: subprocess.Popen[bytes], where: Path) -> None:
    if process.poll() is not None:
        raise Broken(f"exit code {process.returncode}\n{_tail(where)}")


def _tail(where: Path) -> str:
    path = where.with_suffix(".log")
    return path.read_text(encoding="utf-8", errors="replace")[-2500:] if path.exists() else ""


def _to_the_end(job: Job, where: Path, variables: dict[str, str], deadline: Deadline) -> None:
    """Run until it is done; a run that is done already says so by itself and changes nothing."""
    if (where / "whole").exists():
        return
    process = _start(job, where, variables)
    try:
        code = process.wait(timeout=max(deadline.left(), 1))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        raise Broken(f"not at its end in time, at step {_step(where)}") from None
    if code:
        raise Broken(f"exit code {code}\n{_tail(where)}")
    (where / "whole").touch()


def compared(one: Path, other: Path) -> dict[str, Any]:
    """SHA-256 of every tensor file of the last checkpoint of both, and the losses that each logged last for a step."""
    digests = [_digests(place) for place in (one, other)]
    losses = [_losses(place) for place in (one, other)]
    differ = sorted(name for name in {*digests[0], *digests[1]} if digests[0].get(name) != digests[1].get(name))
    same = sum(losses[0].get(step) == loss for step, loss in losses[1].items())
    return {
        "bit_for_bit": not differ and bool(digests[0]), "differ": differ, "digests": digests[1],
        "losses_equal": same, "losses": len(losses[1]),
    }  # fmt: skip


def _digests(place: Path) -> dict[str, str]:
    last = sorted((place / "checkpoints").glob("step-*"))[-1]
    found = {str(path.relative_to(last)): hashlib.sha256(path.read_bytes()).hexdigest() for path in last.glob("*.safetensors")}
    return {**found, "step": last.name}


def _losses(place: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if line[-1:] == "}"]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
