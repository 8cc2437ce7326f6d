"""A tiny real run in a child process, faults by a preloaded C library (shim.c), and the unbroken run to compare with, bit for bit."""

from __future__ import annotations

import hashlib
import os
import platform
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch

from gptoughts.hardware.cpu import read_cpu
from tests.support import warm

ROOT = Path(__file__).resolve().parents[2]
SHIM = Path(__file__).with_name("shim.c")
STEPS = 12
TINY = shlex.split(
    "shakespeare-char --data.tokenizer bytes --log.every 1 --eval.every 6 --eval.batches 1 --sample.tokens 2 --model.width 32 "
    "--model.heads 2 --model.depth 1 --data.sequence-length 32 --train.global-batch 4 --save.keep 3 --numerics off "
    "--layer.compile eager --optim.warmup-steps 2"
)
AT_POINT = "from tests.faults.points import main; main()"
LEFT_OVER = (".writing-", ".dropped-", ".replaced-", ".tmp")
"""Beginnings of names that a checkpoint folder holds only while something is written."""
RUN_SECONDS, LEAVE_SECONDS = 300, 10
"""How long a run may take, and how long a rank may go on when another was killed."""


@dataclass(frozen=True)
class Variant:
    """A kind of run that is compared with an unbroken one of the same kind."""

    name: str
    ranks: int = 1
    words: tuple[str, ...] = ()


SINGLE = Variant("single")
VARIANTS = (
    SINGLE,
    Variant("compiled", words=("--layer.compile", "compile-blocks", "--numerics", "check")),
    Variant("ddp", 2, ("--layer.parallel", "ddp", "--numerics", "check")),
    Variant("fsdp2", 2, ("--layer.parallel", "fsdp2")),
)


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
class Fault:
    """One disturbance of one rank: a failing system call (see shim.c) or a signal at a point (see points.py)."""

    kind: str
    """What it is called in a table."""
    order: str
    rank: int = 0
    at_point: bool = False


@dataclass(frozen=True)
class Life:
    """How the ranks of one start ended."""

    codes: list[int]
    said: str
    struck: list[str]
    """Faults that struck: `OP PATH`, or `point NAME`."""
    ended: float
    """When the last rank ended, on the monotonic clock."""


def world_of(variant: Variant) -> dict[str, str]:
    """Return the variables that a launcher sets on every rank; none for one rank."""
    if variant.ranks == 1:
        return {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = str(variant.ranks)
    return {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


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
            words,
            env=given,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=RUN_SECONDS,
            cwd=self.folder,
        )

    def run_ranks(
        self,
        place: Path,
        variant: Variant,
        faults: Sequence[Fault] = (),
        *,
        together: bool = False,
        variables: Mapping[str, str] | None = None,
    ) -> Life:
        """Run all ranks of a variant to the end, to an error or to a kill.

        When a rank fails, the others get LEAVE_SECONDS, then SIGKILL, as from a launcher; with `together` they are killed with it, as by a
        machine that loses its power.
        """
        (self.folder / "faults.log").unlink(missing_ok=True)
        shared = world_of(variant)
        ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if shared else {} for rank in range(variant.ranks)]
        processes = [self._start(place, variant, {**(variables or {}), **own}, faults) for own in ranks]
        ends = time.monotonic() + RUN_SECONDS
        while any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes):
                ends = min(ends, time.monotonic() + (0 if together else LEAVE_SECONDS))
            if time.monotonic() >= ends:
                for process in processes:
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        ended = time.monotonic()
        said = [(place.parent / f"{place.name}.{rank}.log").read_text(encoding="utf-8") for rank in range(variant.ranks)]
        return Life([process.returncode for process in processes], "\n".join(said), self.struck(), ended)

    def _start(self, place: Path, variant: Variant, world: dict[str, str], faults: Sequence[Fault]) -> subprocess.Popen[bytes]:
        rank = int(world.get("RANK", 0))
        mine = [fault for fault in faults if fault.rank == rank]
        calls = [fault.order for fault in mine if not fault.at_point]
        given = self.environment(calls, **world)
        base = {key: value for key, value in given.items() if key not in ("FAULTS", "FAULTS_LOG")}
        words = self.words(place, *variant.words, "--data.cache", str(place.parent / f"{place.name}-cache"))
        point = next((fault.order for fault in mine if fault.at_point), None)
        start = warm.command(*words, environment=base) if point is None else [*warm.script(AT_POINT, base), point, *words]
        with (place.parent / f"{place.name}.{rank}.log").open("wb") as log:
            return subprocess.Popen(start, env=given, stdout=log, stderr=log, cwd=self.folder)

    def struck(self) -> list[str]:
        """Return the calls of the last run that failed by a fault: `OP PATH`."""
        log = self.folder / "faults.log"
        return log.read_text(encoding="utf-8").splitlines() if log.exists() else []


def prepare(folder: Path, lines: int = 200) -> Runs:
    """Write a text of so many lines and build the library."""
    words = random.Random(3)
    text = ("".join(words.choice("abcdefgh ") for _ in range(60)) for _ in range(lines))
    (folder / "text.txt").write_text("\n".join(text), encoding="utf-8")
    (folder / "home").mkdir()
    return Runs(folder, shim(folder))


def losses(place: Path) -> dict[int, str]:
    """Return step -> loss as hexadecimal float, of the last attempt that made the step."""
    from gptoughts.run.tracking.jsonl import read

    return {row["step"]: float(row["train/loss"]).hex() for row in read(place / "metrics.jsonl") if "train/loss" in row}


def hashes(checkpoint: Path) -> dict[str, str]:
    """Return the SHA-256 of the tensors of a checkpoint, which resuming must reproduce."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(checkpoint.glob("*.safetensors"))}


def last(place: Path, step: int = STEPS) -> Path:
    """Return the checkpoint of a step of the run in `place`."""
    return place / "checkpoints" / f"step-{step:06d}"


def steps_of(place: Path) -> list[int]:
    """Return the steps of the checkpoints in a run folder."""
    return sorted(int(path.name.removeprefix("step-")) for path in (place / "checkpoints").glob("step-*"))


def same(place: Path, reference: Path) -> bool:
    """Return whether a run made the losses and the last checkpoint of another, bit for bit."""
    return losses(place) == losses(reference) and hashes(last(place)) == hashes(last(reference)) != {}


def is_clean(ran: subprocess.CompletedProcess[str]) -> bool:
    """Return whether a run printed no traceback."""
    return "Traceback" not in f"{ran.stdout or ''}{ran.stderr}"


def left_over(place: Path) -> list[str]:
    """Return what a run left in its folder of checkpoints beside them."""
    return [path.name for path in (place / "checkpoints").glob(".*") if path.name.startswith(LEFT_OVER)]


def heading(command: str) -> dict[str, str]:
    """Return the first entries of a record: how it was made, and where."""
    return {"command": command, "torch": torch.__version__, "machine": f"{read_cpu().label()}, {platform.system()}"}
