"""Random faults in real runs, for as long as asked: every run must reach the unbroken run's losses and checkpoints, bit for bit.

python -m tests.faults.soak --kills 200 --seed 1 --to docs/measurements/cpu/kills.json     only kill -9, at system calls and points of the code
python -m tests.faults.soak --minutes 60 --seed 1 --to docs/measurements/cpu/soak.json     also SIGTERM and failing system calls

A table by injection point goes beside the record, as .md.
Runs have one or two ranks, as single process, compiled, DDP and FSDP2 (see harness.VARIANTS). A seed makes the same choices; what the clock
does with them differs.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from tests.faults.harness import STEPS, VARIANTS, Fault, Life, Runs, Variant, heading, last, left_over, losses, prepare, same
from tests.faults.points import POINTS

PLACES = {
    "open": (".writing-step-", "metrics.jsonl", "checkpoints/latest", "evidence"),
    "write": (".writing-step-", ".writing-step-", "metrics.jsonl", "numerics", "plan"),
    "sync": (".writing-step-", "checkpoints/latest"),
    "rename": ("/step-", "checkpoints/latest", "checkpoints/best"),
    "unlink": (".dropped-", ".replaced-"),
    "read": ("checkpoints/step-", "/text.txt"),
}
"""Calls that fail, and parts of the paths where they do."""
ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS")
MOST_LIVES = 8
"""Disturbed lives of a run; then it may go on to its end."""
EXITS = (0, 2, 74, 76, 143, -signal.SIGKILL)
"""Exit codes of a rank that is disturbed: complete, an unreadable file, no checkpoint written, another rank lost, SIGTERM, killed."""


@dataclass
class Record:
    """What happened."""

    seed: int
    only_kills: bool
    began: float = field(default_factory=time.monotonic)
    runs: Counter[str] = field(default_factory=Counter)
    lives: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    struck: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    inside_a_write: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, variant: Variant, life: Life) -> None:
        """Count how the ranks of one start ended."""
        self.lives[variant.name] += 1
        for code in life.codes:
            self.exits[str(code)] += 1
        kinds = [line.removeprefix("point ") if line.startswith("point ") else _kind(line) for line in life.struck]
        killed = -signal.SIGKILL in life.codes
        self.kills[variant.name] += killed
        self.struck.update(kinds)
        self.inside_a_write += killed and any("/checkpoints/" in line and not line.startswith("read ") for line in life.struck)

    def to_json(self, command: str) -> dict[str, Any]:
        """Return the record as plain values."""
        return {
            **heading(command),
            "seconds": round(time.monotonic() - self.began), "steps_per_run": STEPS, "runs": dict(self.runs),
            "runs_with_other_bits": len(self.wrong), "lives": dict(self.lives), "kills": dict(self.kills),
            "kills_inside_a_checkpoint_write": self.inside_a_write, "faults_that_struck": dict(sorted(self.struck.items())),
            "exit_codes_of_ranks": dict(sorted(self.exits.items())), "wrong": self.wrong,
        }  # fmt: skip


def _kind(line: str) -> str:
    call, _, path = line.partition(" ")
    part = next((part for part in PLACES[call] if part in path), "another file")
    return f"{call} {part.strip('./-')}"


def fault(chance: random.Random, variant: Variant, only_kills: bool) -> Fault:
    """Return a random fault of a random rank."""
    rank = chance.randrange(variant.ranks)
    if chance.random() < 0.4:
        point = chance.choice(list(POINTS))
        turn = chance.choice([1, 1, 2, 3, 5, 8])
        return Fault(point, f"{point}:{turn}:{chance.choice([0, 0, 1, 3, 10, 30, 100])}", rank, at_point=True)
    call = chance.choice(list(PLACES))
    errors = ["TERM", chance.choice(ERRORS), chance.choice(ERRORS), "SHORT" if call == "write" else "KILL"]
    action = chance.choice(["KILL", "KILL", "KILL", *([] if only_kills else errors)])
    after = chance.choice([0, 0, 1, 2, 4, 8, 16])
    return Fault(call, f"{call}:{action}:{chance.choice(PLACES[call])}:{after}:{chance.choice([1, 1, 3])}", rank)


def one_run(runs: Runs, variant: Variant, chance: random.Random, record: Record) -> str:
    """Disturb one run until it is complete, and compare it. Returns what is wrong."""
    place, told = runs.folder / "run", list[str]()
    for old in (place, runs.folder / "run-cache"):
        shutil.rmtree(old, ignore_errors=True)
    for number in range(MOST_LIVES + 1):
        chosen = [fault(chance, variant, record.only_kills) for _ in range(3)] if number < MOST_LIVES else []
        life = runs.run_ranks(place, variant, chosen, together=chance.random() < 0.3)
        record.add(variant, life)
        told.append(f"{variant.name}: {[(each.rank, each.order) for each in chosen]} -> {life.codes} {life.struck}")
        if "Traceback" in life.said:
            return f"traceback after {told}: {life.said[-3000:]}"
        if not all(code in EXITS for code in life.codes):
            return f"exit codes {life.codes} after {told}: {life.said[-3000:]}"
        if not any(life.codes) and last(place).is_dir():
            break
    if not last(place).is_dir():
        return f"not complete after {told}: {life.said[-3000:]}"
    if not same(place, runs.folder / variant.name):
        return f"other bits after {told}: losses equal: {losses(place) == losses(runs.folder / variant.name)}"
    left = left_over(place)
    return f"left over after {told}: {left}" if left else ""


def references(runs: Runs) -> None:
    """Make the run of every variant that nothing disturbs."""
    for variant in VARIANTS:
        life = runs.run_ranks(runs.folder / variant.name, variant)
        if any(life.codes):
            raise SystemExit(life.said)


def soak(runs: Runs, record: Record, minutes: float, kills: int) -> None:
    """Disturb run after run until the time is over or so many processes were killed."""
    chance, variants = random.Random(record.seed), cycle(VARIANTS)
    ends = record.began + 60 * minutes
    while not record.wrong and (record.kills.total() < kills if kills else time.monotonic() < ends):
        variant = next(variants)
        found = one_run(runs, variant, chance, record)
        record.runs[variant.name] += 1
        record.wrong += [found] if found else []
        print(
            f"{time.monotonic() - record.began:.0f} s: {record.runs.total()} runs, {record.kills.total()} kills,"
            f" {record.inside_a_write} of them inside a checkpoint write, {len(record.wrong)} runs with other bits",
            flush=True,
        )


def to_markdown(record: dict[str, Any]) -> str:
    """Return the record as tables: runs, kills and other bits by variant, and what struck by injection point."""
    names, runs = list(record["runs"]), record["runs"]
    struck = record["faults_that_struck"]
    lines = [
        "# Faults in real runs", "", f"Made by `{record['command']}` in {record['seconds'] / 60:.0f} min on {record['machine']}, torch {record['torch']}.",
        f"{sum(runs.values())} runs of {record['steps_per_run']} steps were disturbed again and again and reached their end; {record['runs_with_other_bits']}",
        f"of them with other losses or weights than the unbroken run. {sum(record['kills'].values())} starts were killed, {record['kills_inside_a_checkpoint_write']} of them",
        "inside a checkpoint write.", "",
        f"| | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}",
        *(f"| {title} | {' | '.join(str(record[key].get(name, 0)) for name in names)} |"
          for title, key in (("runs", "runs"), ("starts", "lives"), ("starts that were killed", "kills"))),
        "", "| injection point: part of the code, or system call and file | times it struck |", "| --- | ---: |",
        *(f"| {kind} | {times} |" for kind, times in struck.items()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, print and keep the record; exit with 1 if a run differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--kills", type=int, default=0, help="only kill -9, until so many killed a run; 0: all faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--to", type=Path, help="file for the record")
    given = parser.parse_args()
    length = f"--kills {given.kills}" if given.kills else f"--minutes {given.minutes:g}"
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        runs = prepare(Path(folder))
        references(runs)
        record = Record(given.seed, only_kills=bool(given.kills))
        soak(runs, record, given.minutes, given.kills)
    found = record.to_json(f"python -m tests.faults.soak {length} --seed {given.seed}")
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if given.to:
        given.to.write_text(text, encoding="utf-8")
        given.to.with_suffix(".md").write_text(to_markdown(found), encoding="utf-8")
    raise SystemExit(bool(found["wrong"]))


if __name__ == "__main__":
    main()
