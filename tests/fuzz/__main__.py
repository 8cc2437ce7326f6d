"""Fuzz the readers: `python -m tests.fuzz --minutes 60 --seed 1 [--reader NAME] --to docs/measurements/cpu/fuzz.json`.

Each crash is reduced to the fewest steps that give it and written below `--cases`; the file is the report.
"""

from __future__ import annotations

import argparse
import base64
import collections
import hashlib
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any

from gptoughts.files import write_json
from gptoughts.processes import LimitedChild, LimitExceeded
from tests.fuzz.child import ADDRESS_SPACE, CPU_SECONDS
from tests.fuzz.mutations import NAMES, Step
from tests.fuzz.readers import READERS

TURN_SECONDS = 10
"""Time that a reader has before the next one has a turn."""
MOST_STEPS = 4


class Fuzzer:
    """Counts of one reader, and its crashes by kind."""

    def __init__(self, name: str, seed: int, cases: Path) -> None:
        self.name, self.chance, self.folder = name, random.Random(f"{seed} {name}"), cases / name
        self.child = new_child()
        self.counts: collections.Counter[str] = collections.Counter()
        self.errors: set[str] = set()
        self.crashes: dict[str, dict[str, Any]] = {}
        self.seeds = self._ask({})["seeds"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.child.ask({"reader": self.name, **request})
        except LimitExceeded as error:
            return {"outcome": "crash", "kind": f"limit: {str(error)[:60]}", "error": str(error)[:400], "trace": ""}

    def turn(self, until: float) -> None:
        """Try cases until a time."""
        while time.monotonic() < until:
            seed = self.chance.randrange(self.seeds)
            steps = [
                (self.chance.choice(NAMES), self.chance.randrange(2**32)) for _ in range(self.chance.randint(1, MOST_STEPS))
            ]
            answer = self._ask({"seed": seed, "steps": steps})
            self.counts[answer["outcome"]] += 1
            if answer["outcome"] == "refused":
                self.errors.add("".join(letter for letter in answer["error"] if not letter.isdigit())[:60])
            if answer["outcome"] == "crash" and answer["kind"] not in self.crashes:
                self.crashes[answer["kind"]] = self._reduced(answer, seed, steps)

    def _reduced(self, answer: dict[str, Any], seed: int, steps: list[Step]) -> dict[str, Any]:
        """Drop steps that the crash does not need, and write the file."""
        for step in list(steps):
            fewer = [other for other in steps if other is not step]
            if fewer and self._ask({"seed": seed, "steps": fewer}).get("kind") == answer["kind"]:
                steps = fewer
        found = self._ask({"seed": seed, "steps": steps, "only_content": True})
        content = base64.b64decode(found["content"])
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{seed}-{hashlib.sha256(content).hexdigest()[:10]}{found['suffix']}"
        path.write_bytes(content)
        print(f"{self.name}: {answer['kind']}: {answer['error']}\n  {path}, {len(content):,} bytes, steps {steps}", flush=True)
        print("  " + answer["trace"].strip().replace("\n", "\n  "), flush=True)
        return {"error": answer["error"], "seed": seed, "steps": steps, "file": path.name}

    def report(self) -> dict[str, Any]:
        """Return what was tried and found."""
        return {"cases": self.counts.total(), **{word: self.counts[word] for word in ("read", "refused", "crash")},
                "distinct_errors": len(self.errors), "crashes": self.crashes}  # fmt: skip


def new_child() -> LimitedChild:
    """Return a child that reads cases."""
    return LimitedChild("tests.fuzz.child", "answering", CPU_SECONDS, ADDRESS_SPACE)


def main() -> int:
    """Fuzz in turns; exit code 1 if a reader crashed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--reader", action="append", choices=list(READERS))
    parser.add_argument("--to", type=Path)
    parser.add_argument("--cases", type=Path, default=Path("out/fuzz"))
    given = parser.parse_args()
    begun = time.monotonic()
    end = begun + 60 * given.minutes
    fuzzers = [Fuzzer(name, given.seed, given.cases) for name in given.reader or READERS]
    while time.monotonic() < end:
        for one in fuzzers:
            one.turn(min(end, time.monotonic() + min(TURN_SECONDS, 60 * given.minutes / len(fuzzers))))
        if given.to is not None:
            write_json(given.to, _report(fuzzers, given, begun))
    for one in fuzzers:
        found = one.report()
        print(f"{one.name:12} {found['cases']:9,} cases  {found['read']:8,} read  {found['refused']:9,} refused  "
              f"{found['distinct_errors']:5} errors  {len(found['crashes'])} kinds of crashes")  # fmt: skip
    return 1 if any(one.crashes for one in fuzzers) else 0


def _report(fuzzers: list[Fuzzer], given: argparse.Namespace, begun: float) -> dict[str, Any]:
    return {
        "command": " ".join(["python -m tests.fuzz", *sys.argv[1:]]),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "seed": given.seed,
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "cases": sum(one.counts.total() for one in fuzzers),
        "crashes": sum(len(one.crashes) for one in fuzzers),
        "readers": {one.name: one.report() for one in fuzzers},
    }


if __name__ == "__main__":
    sys.exit(main())
