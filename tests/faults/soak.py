"""Random kills, signals and failing system calls for as long as asked: every run must reach the unbroken run's losses and weights.

python -m tests.faults.soak --minutes 60 --seed 1 --to docs/measurements/cpu/soak.json
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.faults.harness import STEPS, Runs, hashes, is_clean, last, losses, prepare

PLACES = {
    "open": (".writing-step-", "metrics.jsonl", "checkpoints/latest", "evidence"),
    "write": (".writing-step-", "metrics.jsonl", "numerics", "plan"),
    "sync": (".writing-step-", "checkpoints/latest"),
    "rename": ("/step-", "checkpoints/latest", "checkpoints/best"),
    "unlink": (".dropped-", ".replaced-"),
    "read": ("checkpoints/step-", "text"),
}
"""Calls that fail, and parts of the paths where they do."""
ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS")
MOST_LIVES = 12
"""Disturbed lives of a run; then it may go on to its end."""


def fault(chance: random.Random) -> tuple[str, str]:
    """Return a kind of fault for the table, and the fault itself."""
    call = chance.choice(list(PLACES))
    action = chance.choice(["KILL", "KILL", "KILL", "TERM", "ERROR", "ERROR", "SHORT" if call == "write" else "KILL"])
    shown, action = f"{call} {action}", chance.choice(ERRORS) if action == "ERROR" else action
    count = chance.choice([1, 1, 3])
    return shown, f"{call}:{action}:{chance.choice(PLACES[call])}:{chance.choice([0, 0, 1, 2, 4, 8, 16])}:{count}"


def one_run(runs: Runs, chance: random.Random, reference: Path, found: Counter[str], exits: Counter[str]) -> list[str]:
    """Disturb one run until it is complete, and compare it. Returns what is wrong."""
    place = runs.folder / "run"
    shutil.rmtree(place, ignore_errors=True)
    told: list[str] = []
    for life in range(MOST_LIVES + 1):
        chosen = dict(fault(chance) for _ in range(3)) if life < MOST_LIVES else {}
        ran = runs.run(place, faults=list(chosen.values()))
        struck = {line.split()[0] for line in runs.struck()}
        found.update(kind for kind in chosen if kind.split()[0] in struck)
        exits[str(ran.returncode)] += 1
        told.append(f"{';'.join(chosen.values())} -> {ran.returncode}")
        if not is_clean(ran):
            return [f"traceback after {told}: {ran.stderr[-1500:]}"]
        if ran.returncode not in (0, -9, 2, 74, 143):
            return [f"exit code {ran.returncode} after {told}: {ran.stderr[-1500:]}"]
        if ran.returncode == 0 and last(place).is_dir():
            break
    if losses(place) != losses(reference) or hashes(last(place)) != hashes(last(reference)):
        return [f"other bits after {told}"]
    return []


def soak(minutes: float, seed: int) -> dict[str, Any]:
    """Run until the time is over. Returns the record."""
    chance, began = random.Random(seed), time.monotonic()
    found: Counter[str] = Counter()
    exits: Counter[str] = Counter()
    wrong: list[str] = []
    done = 0
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        runs = prepare(Path(folder))
        ran = runs.run(runs.folder / "reference")
        if ran.returncode:
            raise SystemExit(ran.stderr)
        while time.monotonic() < began + 60 * minutes and not wrong:
            wrong += one_run(runs, chance, runs.folder / "reference", found, exits)
            done += 1
            print(
                f"{time.monotonic() - began:.0f} s: {done} runs, {sum(found.values())} faults struck, {len(wrong)} wrong",
                flush=True,
            )
    return {
        "command": f"python -m tests.faults.soak --minutes {minutes:g} --seed {seed}", "torch": torch.__version__,
        "machine": f"{platform.machine()}, {platform.system()}", "seconds": round(time.monotonic() - began), "steps": STEPS, "runs": done,
        "bit_identical": done - len(wrong), "lives": sum(exits.values()), "exit_codes": dict(sorted(exits.items())),
        "faults_that_struck": dict(sorted(found.items())), "wrong": wrong,
    }  # fmt: skip


def main() -> None:
    """Parse the command line, print and keep the record; exit with 1 if a run differed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--to", type=Path, help="file for the record")
    given = parser.parse_args()
    record = soak(given.minutes, given.seed)
    text = json.dumps(record, indent=1) + "\n"
    print(text)
    if given.to:
        given.to.write_text(text, encoding="utf-8")
    raise SystemExit(bool(record["wrong"]))


if __name__ == "__main__":
    main()
