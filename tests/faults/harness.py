"""A tiny real run in a child process, faults by a preloaded C library (shim.c), and the unbroken run to compare with, bit for bit."""

from __future__ import annotations

import hashlib
import os
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from tests.support import warm

ROOT = Path(__file__).resolve().parents[2]
SHIM = Path(__file__).with_name("shim.c")
STEPS = 12
TINY = shlex.split(
    "shakespeare-char --data.tokenizer bytes --log.every 1 --eval.every 6 --eval.batches 1 --sample.tokens 2 --model.width 32 "
    "--model.heads 2 --model.depth 1 --data.sequence-length 32 --train.global-batch 4 --save.keep 3 --numerics off "
    "--layer.compile eager --optim.warmup-steps 2"
)
COMPARED = ("model.safetensors", "optimizer.safetensors")


@cache
def shim(folder: Path) -> Path:
    """Compile the library into `folder` and return it."""
    library = folder / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(SHIM), "-ldl"], check=True)
    return library


def can_compile() -> bool:
    """Return whether the library can be built and preloaded here."""
    return sys.platform == "linux" and shutil.which("gcc") is not None


@dataclass(frozen=True)
class Runs:
    """Where tiny runs are made: a folder with text and the library of faults."""

    folder: Path
    library: Path

    def words(self, place: Path, *more: str, steps: int = STEPS, every: int = 2) -> list[str]:
        """Return the words of a run in `place`."""
        data = ["--data.path", str(self.folder / "text.txt"), "--data.cache", str(self.folder / "cache")]
        length = ["--train.steps", str(steps), "--save.every", str(every)]
        return ["train", *TINY, *data, *length, "--run-dir", str(place), *more]

    def environment(self, faults: Sequence[str] = (), **more: str) -> dict[str, str]:
        """Return the variables of a run with faults, each `OP:ACTION:PATH:AFTER:COUNT` (see shim.c)."""
        own = {"OMP_NUM_THREADS": "1", "LD_PRELOAD": str(self.library), "PYTHONPATH": str(ROOT)}
        own |= {"FAULTS": ";".join(faults), "FAULTS_LOG": str(self.folder / "faults.log"), "HOME": str(self.folder / "home")}
        return {**os.environ, **own, **more}

    def run(
        self, place: Path, *more: str, faults: Sequence[str] = (), variables: dict[str, str] | None = None,
        stdout: int | IO[Any] = subprocess.PIPE, **shape: int,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run to the end, to an error or to a kill, in a fork of a process that has imported torch."""
        (self.folder / "faults.log").unlink(missing_ok=True)
        given = self.environment(faults, **(variables or {}))
        base = {key: value for key, value in given.items() if key not in ("FAULTS", "FAULTS_LOG")}
        words = warm.command(*self.words(place, *more, **shape), environment=base)
        return subprocess.run(
            words, env=given, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, timeout=300, cwd=self.folder
        )

    def struck(self) -> list[str]:
        """Return the calls of the last run that failed by a fault: `OP PATH`."""
        log = self.folder / "faults.log"
        return log.read_text(encoding="utf-8").splitlines() if log.exists() else []


def prepare(folder: Path) -> Runs:
    """Write the text and build the library."""
    words = random.Random(3)
    lines = ("".join(words.choice("abcdefgh ") for _ in range(60)) for _ in range(200))
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "home").mkdir()
    return Runs(folder, shim(folder))


def losses(place: Path) -> dict[int, str]:
    """Return step -> loss as hexadecimal float, of the last attempt that made the step."""
    from gptoughts.run.tracking.jsonl import read

    return {row["step"]: float(row["train/loss"]).hex() for row in read(place / "metrics.jsonl") if "train/loss" in row}


def hashes(checkpoint: Path) -> dict[str, str]:
    """Return the SHA-256 of the files of a checkpoint that resuming must reproduce."""
    return {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in COMPARED}


def last(place: Path, step: int = STEPS) -> Path:
    """Return the checkpoint of a step of the run in `place`."""
    return place / "checkpoints" / f"step-{step:06d}"


def steps_of(place: Path) -> list[int]:
    """Return the steps of the checkpoints in a run folder."""
    return sorted(int(path.name.removeprefix("step-")) for path in (place / "checkpoints").glob("step-*"))


def is_clean(ran: subprocess.CompletedProcess[str]) -> bool:
    """Return whether a run printed no traceback."""
    return "Traceback" not in f"{ran.stdout or ''}{ran.stderr}"
