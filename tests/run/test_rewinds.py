"""After a bad step the run goes on from its last checkpoint behind the data of that step, the same bits whether it is killed then or not."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptoughts.run.tracking.jsonl import read, rows
from tests.support.rewind_worker import BATCH

ROOT = Path(__file__).parents[2]
STEPS = 20


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return with_text(tmp_path / "place")


def with_text(folder: Path) -> Path:
    folder.mkdir()
    words = random.Random(3)
    lines = ("".join(words.choice("abcdefgh ") for _ in range(60)) for _ in range(300))
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def train(
    folder: Path, *broken: int, limit: int = 3, killed: int = 0, ranks: int = 1, steps: int = STEPS
) -> subprocess.CompletedProcess[str]:
    """A process that trains in `folder`. The weights break after `broken` batches of the data, it is killed after `killed` of them."""
    words = ["-m", "tests.support.rewind_worker", str(folder), str(steps), str(limit), str(killed), *map(str, broken)]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*start, *words] if ranks > 1 else [sys.executable, *words]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=400)


def weights(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    at = folder / "run" / "checkpoints" / f"step-{step:06d}"
    return {
        f"{stem}/{name}": value
        for stem in ("model", "optimizer")
        for name, value in load_file(at / f"{stem}.safetensors").items()
    }


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def record(folder: Path) -> Any:
    return json.loads((folder / "run" / "rewinds.json").read_text(encoding="utf-8"))


def samples_reached(folder: Path, step: int = STEPS) -> int:
    state = json.loads((folder / "run" / "checkpoints" / f"step-{step:06d}" / "state.json").read_text(encoding="utf-8"))
    return int(state["run"]["progress"]["cursor"]["samples"])


def test_the_run_passes_over_the_data_and_a_kill_afterwards_changes_no_bit(place: Path, tmp_path: Path) -> None:
    """Weights break after batch 12, so step 13 is bad: back to step 10, and step 11 takes batch 14."""
    ran = train(place, 12)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert record(place) == [{"step": 10, "samples": 10 * BATCH, "passed": 13 * BATCH}]
    assert samples_reached(place) == (STEPS + 3) * BATCH
    said = ran.stdout + ran.stderr
    assert "step 13: loss or gradient norm is not finite, samples 48 to 51 of the data order; going back" in said
    assert "samples 40 to 51 of the data order are passed over, after 1 rewind" in said
    whole = read(place / "run" / "metrics.jsonl")
    assert {row["train/bad_steps"] for row in whole if row["step"] > 10 and "train/loss" in row} == {1}
    assert [row["attempt"] for row in whole if "train/loss" in row] == [1] * 10 + [2] * 10

    other = with_text(tmp_path / "other")
    killed = train(other, 12, killed=16)  # step 13 after the rewind, before the next checkpoint
    assert killed.returncode == -9 and samples_reached(other, 10) == 10 * BATCH
    assert record(other) == record(place)
    again = train(other, 12)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "going back" not in again.stdout + again.stderr and ", bit for bit" in again.stdout
    assert equal(weights(place), weights(other))
    first, second = (
        {row["step"]: row["train/loss"] for row in read(one / "run" / "metrics.jsonl") if "train/loss" in row}
        for one in (place, other)
    )
    assert first == second


def test_before_the_first_checkpoint_it_goes_back_to_the_start_and_a_bound_stops_it(place: Path) -> None:
    """Bad steps at batches 3 and 5, both before step 5: the second rewind passes over the data of the first one too."""
    ran = train(place, 2, 5, 10, limit=2)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr, ran.stderr[-3000:]
    assert record(place) == [
        {"step": 0, "samples": 0, "passed": 3 * BATCH},
        {"step": 0, "samples": 0, "passed": 6 * BATCH},
    ]
    assert "the run went back 2 times (train.bad_step_limit); the batch is in" in ran.stderr, ran.stderr
    assert len(list((place / "run").glob("bad-step-*.safetensors"))) >= 1
    attempts = {row["attempt"] for row in rows(place / "run" / "metrics.jsonl")}
    assert attempts == {1, 2, 3}


@pytest.mark.slow
def test_two_ranks_rewind_together(place: Path) -> None:
    ran = train(place, 12, ranks=2)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert record(place) == [{"step": 10, "samples": 10 * BATCH, "passed": 13 * BATCH}]
    assert samples_reached(place) == (STEPS + 3) * BATCH
