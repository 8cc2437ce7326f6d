"""Make runs slow in a known way, ask what limits them, and measure the flag that the run proposes.

python -m benchmarks.limiter --to docs/measurements/cpu/limiter.json
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click

import gptoughts
from benchmarks import front
from gptoughts.diagnostics.bench.figures import machine_figures
from gptoughts.engine.checkpoint import writer
from gptoughts.hardware.machine import probe
from gptoughts.run import session
from gptoughts.run.tracking.jsonl import read

ROOT = Path(__file__).resolve().parents[1]
TEXT = "".join(f"line {number}: the quick brown fox jumps over {number % 7} lazy dogs\n" for number in range(2000))
COMMON = {
    "name": "limited", "data.tokenizer": "bytes", "data.sequence_length": 64, "train.global_batch": 16, "model.depth": 2,
    "model.width": 64, "model.heads": 2, "optim.warmup_steps": 0, "eval.every": 0, "eval.batches": 1, "sample.tokens": 1,
    "save.every": 0, "log.every": 4, "train.steps": 40,
}  # fmt: skip
PLAIN = {
    "compile": "eager",
    "host": "system",
    "precision": "fp32",
    "optimizer": "plain",
    "attention": "math",
    "microbatch": "whole",
}


@contextmanager
def slow_loader(seconds: float) -> Iterator[None]:
    """Let every batch take `seconds` to read."""
    fast = session.prepare_batches

    def slow(*arguments: Any) -> Iterator[Any]:
        for batch in fast(*arguments):
            time.sleep(seconds)
            yield batch

    with patch.object(session, "prepare_batches", slow):
        yield


@contextmanager
def slow_disk(seconds: float) -> Iterator[None]:
    """Let every checkpoint take `seconds` longer to reach the disk."""
    fast = writer.write

    def slow(*arguments: Any) -> Path:
        time.sleep(seconds)
        return fast(*arguments)

    with patch.object(writer, "write", slow):
        yield


class SlowRank(gptoughts.Callback):
    """Lets every forward of the last rank take `seconds` longer."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_start(self, engine: Any, progress: Any) -> None:
        """Delay the forwards."""
        if engine.ranks.world.rank == engine.ranks.size - 1 > 0:
            engine.bare.register_forward_pre_hook(lambda *_: time.sleep(self.seconds))


@contextmanager
def nothing(seconds: float) -> Iterator[None]:
    """Slow nothing down."""
    yield


@dataclass(frozen=True)
class Case:
    """A run that is slow in one way, and the verdict that names it."""

    expected: str
    slow: Callable[[float], Any] = nothing
    seconds: float = 0.0
    fields: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 1


CASES = {
    "slow loader": Case("data", slow_loader, 0.25, {"train.global_batch": 32}),
    "many small operators": Case(
        "host", fields={"model.width": 16, "data.sequence_length": 8}, layers={"microbatch": "fixed", "microbatch.sequences": 1}
    ),
    "slow disk": Case("checkpoint", slow_disk, 0.8, {"save.every": 2, "train.steps": 24, "log.every": 2}),
    "slow rank": Case("straggler", seconds=0.3, layers={"parallel": "ddp"}, ranks=2),
}


def train(name: str, folder: Path, flags: Mapping[str, str]) -> None:
    """Train one case in this process, or as one of its ranks."""
    case = CASES[name]
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    fields = {**COMMON, "data.path": str(folder / "text.txt"), "data.cache": str(folder / "cache"), **case.fields}
    fields |= {flag: value for flag, value in flags.items() if not flag.startswith("layer.")}
    layers = {
        **PLAIN,
        **case.layers,
        **{flag.removeprefix("layer."): value for flag, value in flags.items() if flag.startswith("layer.")},
    }
    if layers["microbatch"] == "whole":
        layers.pop("microbatch.sequences", None)
    with case.slow(case.seconds):
        gptoughts.train(
            {},
            fields=fields,
            layers=layers,
            run_dir=str(folder / "run"),
            numerics="off",
            track=("jsonl",),
            callbacks=[SlowRank(case.seconds)],
        )


def launch(name: str, folder: Path, flags: str = "") -> dict[str, Any]:
    """Train one case in processes of its own. Returns its most frequent verdict, the newest advice and the seconds per step."""
    case = CASES[name]
    words = ["-m", "benchmarks.limiter", "--only", name, "--folder", str(folder), "--flags", flags]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    line = [*start, *words] if case.ranks > 1 else [sys.executable, *words]
    ran = subprocess.run(line, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=900)
    if ran.returncode:
        raise RuntimeError(f"{name}: {ran.stderr[-3000:]}")
    return found(folder / "run")


def found(run: Path) -> dict[str, Any]:
    """Return what a run said about itself."""
    rows = [row for row in read(run / "metrics.jsonl") if row.get("perf/limiter")]
    spent = json.loads((run / "goodput.json").read_text(encoding="utf-8"))
    kept = spent["attempts"][-1]
    stepping = sum(spent["parts"][part] for part in ("productive", "data", "checkpoint"))
    verdicts = Counter(row["perf/limiter"] for row in rows)
    return {
        "verdicts": dict(verdicts),
        "limiter": verdicts.most_common(1)[0][0] if verdicts else None,
        "advice": rows[-1]["perf/advice"] if rows else None,
        "seconds_per_step": stepping / max(1, kept["last_step"]),
        "goodput": {part: round(seconds, 3) for part, seconds in spent["parts"].items() if seconds},
    }


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Measure a case with and without the flag that it proposes, interleaved."""
    case = CASES[name]
    before, after, advice = [], [], None
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            first = launch(name, Path(folder))
        before.append(first)
        advice = advice or first["advice"]
        if advice and advice.startswith("--"):
            with tempfile.TemporaryDirectory() as folder:
                after.append(launch(name, Path(folder), advice))
    seconds = [one["seconds_per_step"] for one in before]
    made: dict[str, Any] = {
        "expected": case.expected,
        "limiter": [one["limiter"] for one in before],
        "verdicts": before[0]["verdicts"],
        "advice": advice,
        "seconds_per_step": seconds,
    }
    if after:
        made["seconds_per_step_with_advice"] = [one["seconds_per_step"] for one in after]
        made["speedup"] = statistics.median(seconds) / statistics.median(made["seconds_per_step_with_advice"])
        made["limiter_with_advice"] = [one["limiter"] for one in after]
    return made


def table(cases: Mapping[str, Any]) -> str:
    """Return the table of docs/limits.md from the cases of limiter.json."""
    lines = ["| made slow by | verdict, in every run | tried | s per step | with it |", "|---|---|---|---:|---:|"]
    for name, case in cases.items():
        verdicts = ", ".join(dict.fromkeys(case["limiter"]))
        with_advice = case.get("seconds_per_step_with_advice")
        after = f"{statistics.median(with_advice):.3f} ({case['speedup']:.2f}x)" if with_advice else "not a flag"
        lines.append(
            f"| {name} | {verdicts} | `{case['advice']}` | {statistics.median(case['seconds_per_step']):.3f} | {after} |"
        )
    return "\n".join(lines) + "\n"


def pairs(flags: str) -> dict[str, str]:
    """Return dotted keys of a command line's flags."""
    words = flags.split()
    return {flag.removeprefix("--").replace("-", "_"): value for flag, value in zip(words[::2], words[1::2], strict=True)}


@click.command()
@click.option("--to", help="JSON file to write")
@click.option("--rounds", default=3, help="runs of each kind")
@click.option("--only", type=click.Choice(list(CASES)), help="one case; with --folder in this process")
@click.option("--folder", type=click.Path(path_type=Path), help="train the case of --only there, once")
@click.option("--flags", default="", help="flags of that run")
def command(to: str | None, rounds: int, only: str | None, folder: Path | None, flags: str) -> None:
    """Ask slow runs what limits them, and measure the flags that they propose."""
    if only and folder:
        train(only, folder, pairs(flags))
        return
    path = front.target(to)
    run: dict[str, Any] = {"command": front.typed("benchmarks.limiter"), "machine": machine_figures(probe()), "cases": {}}
    for name in [only] if only else CASES:
        run["cases"][name] = measure(name, rounds)
        front.progress(f"{name}: {json.dumps(run['cases'][name])}")
    front.write(path, run, ("command",))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    front.run(command, "benchmarks.limiter", arguments)


if __name__ == "__main__":
    main()
