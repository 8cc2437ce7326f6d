"""Ten thousand tiny steps with validation, samples and checkpoints: memory, file handles, threads, shared memory and files that are left.

python -m tests.faults.hygiene --steps 10000 --to docs/measurements/cpu/hygiene.json

The ranks are looked at from outside while they train. What grows with the number of steps shows as a difference between an early part of the
run and its end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from gptoughts.run.tracking.jsonl import read
from tests.faults.harness import ROOT, VARIANTS, Runs, Variant, heading, left_over, prepare, world_of

LOOK_SECONDS = 0.2
EARLY, LATE = (0.2, 0.4), (0.8, 1.0)
"""Parts of the steps that are compared; before EARLY, pools and caches fill."""
TENTHS = range(2, 10)
MOST_GROWTH, MOST_MORE = 8 << 20, 64 << 20
"""Bytes of resident memory that a rank may gain steadily, and in all, between the third tenth of the steps and the last. The C library gives
threads pools of up to 64 MiB when they are first needed, which is a jump in one tenth; what leaks grows in each of them."""
TORCHS_CACHE = "torchinductor_"
"""Torch makes its folder of kernels when it is imported."""
OFTEN = ("--eval.every", "50", "--sample.every", "50", "--save.every", "50", "--save.keep", "2", "--layer.loader", "prefetch")


@dataclass(frozen=True)
class Look:
    """One rank at one moment."""

    step: int
    resident_bytes: int
    handles: int
    threads: int
    shared_files: int
    """Files in /dev/shm that the rank has open or mapped."""


@dataclass(frozen=True)
class Found:
    """What became of one run; of several ranks the worst."""

    variant: str
    steps: int
    seconds: float
    growth_bytes: int
    """Steady growth of the resident memory: the median change from tenth to tenth, times their number."""
    handles: tuple[int, int]
    """Median of the open file handles early and late; likewise the next two."""
    threads: tuple[int, int]
    shared_files: tuple[int, int]
    resident_bytes: list[int]
    """Median of the resident memory in each of TENTHS."""
    left_over: list[str]
    """Temporary files of the run that exist after it."""

    def faults(self) -> list[str]:
        """Return what grew or was left."""
        grew = [
            f"{name} grew from {early} to {late}"
            for name, (early, late) in (
                ("handles", self.handles),
                ("threads", self.threads),
                ("shared files", self.shared_files),
            )
            if late > early
        ]
        grew += [f"memory grew steadily by {self.growth_bytes} bytes"] if self.growth_bytes > MOST_GROWTH else []
        more = self.resident_bytes[-1] - self.resident_bytes[0]
        grew += [f"memory grew by {more} bytes"] if more > MOST_MORE else []
        return grew + ([f"left over: {self.left_over}"] if self.left_over else [])


def look(pid: int, step: int) -> Look:
    """Read one process in /proc. Raises OSError when it ended."""
    folder = Path("/proc") / str(pid)
    status = dict(line.split(":", 1) for line in (folder / "status").read_text(encoding="utf-8").splitlines() if ":" in line)
    opened = []
    for handle in (folder / "fd").iterdir():
        with suppress(OSError):
            opened.append(os.readlink(handle))
    mapped = {
        line.split(maxsplit=5)[-1] for line in (folder / "maps").read_text(encoding="utf-8").splitlines() if "/dev/shm/" in line
    }
    shared = mapped | {name for name in opened if name.startswith("/dev/shm/")}
    return Look(step, int(status["VmRSS"].split()[0]) << 10, len(opened), int(status["Threads"]), len(shared))


def watch(runs: Runs, variant: Variant, steps: int) -> Found:
    """Train and look. Raises RuntimeError if a rank fails."""
    place, temporary = runs.folder / variant.name, runs.folder / f"{variant.name}-tmp"
    temporary.mkdir()
    shared = world_of(variant)
    words = [sys.executable, "-P", "-m", "gptoughts", *runs.words(place, *variant.words, *OFTEN, steps=steps, every=50)]
    began, processes = time.monotonic(), list[subprocess.Popen[bytes]]()
    for rank in range(variant.ranks):
        world = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if shared else {}
        given = {**runs.environment(), "LD_PRELOAD": "", "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT), **world}
        with (runs.folder / f"{variant.name}.{rank}.log").open("wb") as log:
            processes.append(subprocess.Popen(words, env=given, stdout=log, stderr=log, cwd=runs.folder))
    looks: list[list[Look]] = [[] for _ in processes]
    while any(process.poll() is None for process in processes):
        step = _step(place)
        for rank, process in enumerate(processes):
            with suppress(OSError, KeyError):
                looks[rank].append(look(process.pid, step))
        time.sleep(LOOK_SECONDS)
    if any(process.returncode for process in processes):
        raise RuntimeError((runs.folder / f"{variant.name}.0.log").read_text(encoding="utf-8", errors="replace")[-3000:])
    left = sorted(path.name for path in temporary.iterdir() if not path.name.startswith(TORCHS_CACHE))
    left += sorted(left_over(place))
    parts = [_parts(rank, steps) for rank in looks]
    early, late = [part for part, _ in parts], [part for _, part in parts]

    def middle(name: str) -> tuple[int, int]:
        one, other = (max(int(median(getattr(each, name) for each in part)) for part in side) for side in (early, late))
        return one, other

    resident = [_tenths(rank, steps) for rank in looks]
    growth = [round(median(later - sooner for sooner, later in pairwise(each)) * (len(each) - 1)) for each in resident]
    worst = growth.index(max(growth))
    return Found(
        variant.name, steps, round(time.monotonic() - began, 1), growth[worst], middle("handles"), middle("threads"),
        middle("shared_files"), resident[worst], left,
    )  # fmt: skip


def _step(place: Path) -> int:
    """Return the last step in the metrics."""
    try:
        with (place / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            rows = [line for line in file.read().splitlines()[1:] if line.endswith(b"}")]
        return int(json.loads(rows[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0


def _parts(looks: list[Look], steps: int) -> tuple[list[Look], list[Look]]:
    early, late = ([each for each in looks if first * steps <= each.step <= last * steps] for first, last in (EARLY, LATE))
    if len(early) < 5 or len(late) < 5:
        raise RuntimeError(f"only {len(early)} and {len(late)} looks: more steps are needed")
    return early, late


def _tenths(looks: list[Look], steps: int) -> list[int]:
    parts = [
        [each.resident_bytes for each in looks if tenth * steps <= 10 * each.step < (tenth + 1) * steps] for tenth in TENTHS
    ]
    return [int(median(part)) for part in parts if part]


def main() -> None:
    """Parse the command line, train each variant, print and keep what was found; exit with 1 if something grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--variants", default="single,ddp", help="of harness.VARIANTS")
    parser.add_argument("--to", type=Path, help="file for the record")
    given = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory(prefix="hygiene-") as folder:
        runs = prepare(Path(folder))
        for variant in (variant for variant in VARIANTS if variant.name in given.variants.split(",")):
            found.append(watch(runs, variant, given.steps))
            rows = [row for row in read(runs.folder / variant.name / "metrics.jsonl") if "train/loss" in row]
            print(found[-1], f"{len(rows)} rows", found[-1].faults(), flush=True)
    record: dict[str, Any] = {
        **heading(f"python -m tests.faults.hygiene --steps {given.steps} --variants {given.variants}"),
        "compared_parts_of_the_steps": [EARLY, LATE],
        "runs": [{**asdict(each), "faults": each.faults()} for each in found],
    }  # fmt: skip
    if given.to:
        given.to.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(any(each.faults() for each in found))


if __name__ == "__main__":
    main()
