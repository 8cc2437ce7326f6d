"""Trainings of the sharding tests: started once in so many ranks, and compared with one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
OPTIM = {"learning_rate": 1e-3, "warmup_steps": 0, "weight_decay": 5.0}
ROWS = {"train": {"steps": 100, "global_batch": 12}, "optim": OPTIM}
"""A batch that 2, 3 and 4 ranks divide, and a decay that shows where it is missing."""

Job = dict[str, Any]
Sets = Mapping[str, Mapping[int, Sequence[str]]]
"""Tier -> ranks -> names of jobs."""
Trained = Callable[[int, str], Path]


def job(name: str, family: str = "modern", loss: float = 1e-5, weight: float = 1e-4, **more: Any) -> Job:
    """A training, with the bounds of its largest difference from one process."""
    layers, recipe = more.get("layers", {}), {**ROWS, **more.get("recipe", {})}
    return {
        "name": name,
        "family": family,
        "layers": {"parallel": "fsdp2", **layers},
        "recipe": recipe,
        "bounds": (loss, weight),
    }


def launch(ranks: int, folder: Path, jobs: Sequence[Job]) -> None:
    """Train `jobs` in this many ranks."""
    words = ["-m", "tests.support.shard_worker", str(folder), json.dumps(jobs)]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*start, *words] if ranks > 1 else [sys.executable, *words]
    ran = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=900)
    assert ran.returncode == 0, ran.stderr[-4000:]


def trainings(factory: pytest.TempPathFactory, sets: Sets, jobs: Mapping[str, Job]) -> Trained:
    """Return the folder in which a set of jobs was trained by so many ranks, once; one process trains the jobs of all."""

    @cache
    def folder(ranks: int, which: str) -> Path:
        made = factory.mktemp(f"{which}-{ranks}")
        names = sets[which][ranks] if ranks > 1 else dict.fromkeys(name for names in sets[which].values() for name in names)
        launch(ranks, made, [jobs[name] for name in names])
        return made

    return folder


def slow_or_long(sets: Sets) -> list[Any]:
    """Parameters (tier, ranks, name) of the sets `all`, which is slow, and `long`."""
    return [
        pytest.param(tier, ranks, name, marks=pytest.mark.slow if tier == "all" else pytest.mark.long)
        for tier in ("all", "long")
        for ranks, names in sets[tier].items()
        for name in names
    ]


def record(folder: Path, name: str, ranks: int) -> dict[str, Any]:
    """What rank 0 wrote about a job."""
    found: dict[str, Any] = json.loads((folder / f"{name}-{ranks}.json").read_text())
    return found


def expect_equal(trained: Trained, job: Job, ranks: int, which: str) -> None:
    """Compare a job's losses and weights with one process."""
    (loss, weight), name = job["bounds"], job["name"]
    alone, together = trained(1, which), trained(ranks, which)
    assert record(alone, name, 1)["losses"] == pytest.approx(record(together, name, ranks)["losses"], rel=loss)
    ours, theirs = load_file(together / f"{name}-{ranks}.safetensors"), load_file(alone / f"{name}-1.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert (ours[key] - value).abs().max() < weight, key
