"""Train ten thousand toy steps with evaluation, samples and checkpoints, and count what the process holds on the way: nothing may grow.

python -m tests.faults.hygiene --to docs/measurements/cpu/hygiene.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import gptoughts
from gptoughts.engine.engine import Engine

STEPS, PERIOD = 10_000, 100
WARM = 0.2
"""Share of the run after which caches of the allocator and of torch are filled."""
MOST_BYTES = 4 << 20
"""Growth of resident memory that is noise of the allocator: less than 1 kB a step, far below what a kept batch or row would take."""
CACHE = "torchinductor_"
"""Folder that torch makes in TMPDIR for later processes of the same user."""
COUNTS = ("file_handles", "threads", "shared_memory", "temporary_files", "checkpoints")


class Counts(gptoughts.Callback):
    """Counts between two checkpoints, when the thread that writes them has ended."""

    def __init__(self, run: Path, temporary: Path) -> None:
        self.run, self.temporary, self.rows = run, temporary, list[dict[str, int]]()

    def due(self, step: int, last: bool) -> bool:
        """Due between two checkpoints."""
        return step % PERIOD == PERIOD // 2

    def on_step(self, engine: Engine, progress: Any, stats: Any, last: bool) -> None:
        """Wait until no checkpoint is being written, and count."""
        deadline = time.monotonic() + 30
        while any(thread.name == "checkpoint" for thread in threading.enumerate()):
            assert time.monotonic() < deadline, "a checkpoint is still being written"
            time.sleep(0.01)
        found = []
        for _ in range(5):  # the sampler of system metrics opens a file for a moment; what leaks stays open
            found.append(held(self.run, self.temporary))
            time.sleep(0.01)
        self.rows.append({"step": progress.step, **{key: min(one[key] for one in found) for key in found[0]}})


def held(run: Path, temporary: Path) -> dict[str, int]:
    """Return what this process holds: bytes of memory, and numbers of the rest."""
    status = Path("/proc/self/status").read_text(encoding="ascii").split()
    maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    return {
        "resident_bytes": 1024 * int(status[status.index("VmRSS:") + 1]),
        "file_handles": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "shared_memory": sum("/dev/shm/" in line or "/memfd:" in line for line in maps),
        "temporary_files": sum(1 for _ in temporary.rglob("*")),
        "checkpoints": len(os.listdir(run / "checkpoints")),
    }


def growth(rows: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Return how much the most of the second half exceeds the most of the first half, of the rows after the warm-up."""
    warm = rows[int(WARM * len(rows)) :]
    first, second = warm[: len(warm) // 2], warm[len(warm) // 2 :]
    keys = ("resident_bytes", *COUNTS)
    return {key: max(row[key] for row in second) - max(row[key] for row in first) for key in keys}


def too_much(found: Mapping[str, int]) -> list[str]:
    """Return what grows."""
    wrong = [f"{key} grows by {found[key]}" for key in COUNTS if found[key] > 0]
    return wrong + [f"resident memory grows by {found['resident_bytes']} bytes"] * (found["resident_bytes"] > MOST_BYTES)


def train(folder: Path, steps: int, callbacks: Sequence[gptoughts.Callback] = ()) -> list[dict[str, int]]:
    """Train `steps` in `folder`. Returns the rows."""
    temporary = folder / "tmp"
    temporary.mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    text = "".join(f"line {number}: the quick brown fox jumps over {number % 7} lazy dogs\n" for number in range(400))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    counts = Counts(folder / "run", temporary)
    fields = {
        "data.path": str(folder / "text.txt"), "data.cache": str(folder / "cache"), "data.sequence_length": 16,
        "model.width": 16, "model.heads": 2, "model.depth": 1, "train.steps": steps, "train.global_batch": 2,
        "log.every": 10, "eval.every": PERIOD, "eval.batches": 2, "save.every": PERIOD, "sample.every": PERIOD, "sample.tokens": 8,
        "train.bad_step": "skip",
    }  # fmt: skip
    gptoughts.train(
        "shakespeare-char",
        fields=fields,
        run_dir=str(folder / "run"),
        track=["tensorboard"],
        callbacks=[counts, *callbacks],
        verbose=False,
    )
    return counts.rows


def measure(steps: int) -> dict[str, Any]:
    """Return the record."""
    began, before = time.monotonic(), set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory(prefix="hygiene-") as folder:
        rows = train(Path(folder), steps)
        left = sorted(path.name for path in Path(folder, "tmp").rglob("*") if not path.name.startswith(CACHE))
    found = growth(rows)
    return {
        "command": f"python -m tests.faults.hygiene --steps {steps}", "torch": torch.__version__,
        "machine": f"{platform.machine()}, {platform.system()}", "seconds": round(time.monotonic() - began), "steps": steps,
        "growth_from_first_to_second_half": found, "wrong": too_much(found) + [f"left in TMPDIR: {name}" for name in left],
        "new_in_dev_shm": sorted(set(os.listdir("/dev/shm")) - before), "rows": rows[:: max(1, len(rows) // 20)],
    }  # fmt: skip


def main() -> None:
    """Parse the command line, print and keep the record; exit with 1 if something grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--to", type=Path, help="file for the record")
    given = parser.parse_args()
    record = measure(given.steps)
    text = json.dumps(record, indent=1) + "\n"
    print(text)
    if given.to:
        given.to.write_text(text, encoding="utf-8")
    raise SystemExit(bool(record["wrong"]))


if __name__ == "__main__":
    main()
