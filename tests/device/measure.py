"""Runs one stage: every measurement that its file does not hold yet, while there is time, each kept as soon as it is there.

python -m tests.device.measure STAGE [--tiny] [--seconds N] [--only WORD] [--again]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from tests.device import stages
from tests.device.box import machine_facts
from tests.device.contract import run_contract
from tests.device.kept import Deadline, Kept
from tests.device.kills import run_kills
from tests.device.report import write_report
from tests.device.training import run_training
from tests.device.turns import Broken, Child, Job, parity_of, take_turns
from tests.device.verbs import bench_gemm, bench_layers, bench_step

STAGE_SECONDS = 8 * 60
NAMES = ("contract", "bf16", "fp8", "ablation", "sharding", "quickstart", "models", "kills", "report")


def main() -> int:
    """The stage named on the command line; 0 if every measurement of it is there."""
    given = _arguments()
    deadline = Deadline(given.seconds)
    if given.stage == "report":
        return write_report(given.tiny)
    kept = Kept(f"{given.stage}{'-tiny' if given.tiny else ''}")
    kept.on(machine_facts())
    if given.stage == "contract":
        return run_contract(kept, deadline, given.tiny, given.only, given.again)
    if given.stage in ("quickstart", "models"):
        return run_training(given.stage, kept, deadline, given.tiny)
    if given.stage == "kills":
        return run_kills(kept, deadline, given.tiny)
    if given.stage == "fp8" and not given.tiny and not any(map(stages.installed, stages.FP8)):
        print("fp8: neither Transformer Engine nor torchao is installed; only bf16 by width is measured", flush=True)
    missing = ceilings(kept, deadline, given.tiny)
    rows = [row for row in stages.STAGES[given.stage]() if given.only in row.name]
    missing += turns([row.tiny() for row in rows if row.shown_tiny] if given.tiny else rows, kept, deadline)
    for step in _verbs(given.stage, given.only):
        missing += step(kept, deadline, given.tiny)
    print(f"{given.stage}: {len(kept.runs)} measurements held, {missing} missing, {deadline.left():.0f} s left", flush=True)
    return 1 if missing else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=NAMES)
    parser.add_argument("--tiny", action="store_true", help="models that a CPU trains in a second")
    parser.add_argument("--seconds", type=float, default=STAGE_SECONDS, help="the stage's time")
    parser.add_argument("--only", default="", metavar="WORD", help="only measurements whose name holds this word")
    parser.add_argument("--again", action="store_true", help="contract: run again what did not pass")
    return parser.parse_args()


def _verbs(stage: str, only: str) -> list[Callable[[Kept, Deadline, bool], int]]:
    """Verbs of the command line that belong to a stage, and whose name holds the word."""
    known: dict[str, dict[str, Callable[[Kept, Deadline, bool], int]]] = {
        "bf16": {"bench-step": bench_step, "bench-gemm": bench_gemm},
        "ablation": {"kills": run_kills, "bench-layers": bench_layers},
    }
    return [verb for name, verb in known.get(stage, {}).items() if only in name]


def ceilings(kept: Kept, deadline: Deadline, tiny: bool) -> int:
    """What the box can do at most, once a file: shares are taken of what was measured in the same sitting."""
    if kept.holds("ceilings"):
        return 0
    job = Job("ceilings", "", {}, {}, "tests.device.ceilings", {"tiny": tiny})
    child = None
    try:
        child = Child(job, deadline)
        child.wait_until_ready()
        child.end()
        kept.keep("ceilings", child.ready)
        print(json.dumps({"ceilings": child.ready}), flush=True)
        return 0
    except Broken as error:
        return _failed(kept, "ceilings", error)
    finally:
        if child is not None:
            child.close()


def turns(rows: Iterable[stages.Turns], kept: Kept, deadline: Deadline) -> int:
    """Measure what is missing; returns how many of the rows still are. One that fails does not stop the others."""
    missing = 0
    for row in rows:
        if kept.holds(row.name):
            continue
        if not deadline.allows(row.seconds):
            print(f"{row.name}: not begun, {deadline.left():.0f} s left", flush=True)
            missing += 1
            continue
        print(f"--- {row.name}", flush=True)
        began = time.monotonic()
        try:
            jobs = take_turns(list(row.jobs), row.rounds, row.steps, deadline)
        except Broken as error:
            missing += _failed(kept, row.name, error)
            continue
        figures: dict[str, Any] = {"jobs": jobs, "took_seconds": round(time.monotonic() - began, 1), **row.also}
        names = list(jobs)
        if len(names) == 2:
            figures["ratios"] = ratios(jobs[names[0]], jobs[names[1]], names)
        kept.keep(row.name, figures)
        print(json.dumps({row.name: _short(figures)}), flush=True)
    return missing


def _failed(kept: Kept, name: str, error: Broken) -> int:
    """1 for what is missing now; a plan that this machine refuses is an answer, and asked for again by the next start."""
    if error.refused:
        kept.values.setdefault("refused", {})[name] = str(error)
        kept.values["failures"].pop(name, None)
        kept.save()
        print(f"{name}: refused here\n{error}", flush=True)
        return 0
    kept.keep_failure(name, str(error))
    print(f"{name}: {error}", flush=True)
    return 1


def ratios(one: dict[str, Any], other: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Tokens per second of two that took turns, round by round, and how their losses lie to each other."""
    from statistics import median

    pairs = [left / right for left, right in zip(one["rounds"], other["rounds"], strict=True)]
    found: dict[str, Any] = {
        f"{names[0]} / {names[1]}": {"median": median(pairs), "min": min(pairs), "max": max(pairs), "rounds": pairs}
    }
    parity = parity_of(one.get("losses", []), other.get("losses", []))
    return found | ({"loss": parity} if parity else {})


def _short(figures: dict[str, Any]) -> dict[str, Any]:
    """What the console shows of a measurement."""
    shown = ("tokens_per_second", "mfu", "peak_memory_bytes", "start_seconds", "micro_batch")
    jobs = {name: {key: job.get(key) for key in shown} for name, job in figures["jobs"].items()}
    for name, job in figures["jobs"].items():
        jobs[name]["not active"] = [line for line in job.get("evidence", []) if line["status"] != "active"]
    return {**jobs, **{key: figures[key] for key in ("ratios", "took_seconds") if key in figures}}


if __name__ == "__main__":
    sys.exit(main())
