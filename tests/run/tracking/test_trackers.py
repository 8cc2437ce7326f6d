"""A run of two ranks and two fake GPUs, killed and resumed: every tracker holds the same keys and each step once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gptoughts.diagnostics.bench.variant_process import free_port
from gptoughts.run.tracking.figures import numbers_and_texts
from gptoughts.run.tracking.jsonl import read, rows
from tests.hardware.test_gpu_sampler import H100, WHOLE, A, B
from tests.support.fake_nvml import NEEDED, compile_library
from tests.support.tracker_files import history, records, scalars

pytest.importorskip("tensorboard")
pytest.importorskip("wandb")
pytestmark = [*NEEDED, pytest.mark.slow]

ROOT = Path(__file__).parents[3]
SECRET = "wandb-key-of-nobody-0123456789abcdef"
TEXT = "".join(f"line {number}: the quick brown fox jumps over {number % 7} lazy dogs\n" for number in range(200))


@dataclass
class Tracked:
    """A run folder, and what its processes printed."""

    out: Path
    said: str

    def wandb_files(self) -> list[Path]:
        return sorted((self.out / "wandb").glob("offline-run-*/*.wandb"))


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    """Killed after step 7 of 12, its newest checkpoint being of step 4, and resumed."""
    here = tmp_path_factory.mktemp("tracked")
    library = compile_library(tmp_path_factory.mktemp("nvml"))
    (here / "text.txt").write_text(TEXT)
    box = f"gpu {A} 00000000:3B:00.0 {H100}\n{WHOLE}gpu {B} 00000000:5E:00.0 {H100}\n{WHOLE.replace('busy 50', 'busy 90')}"
    (here / "box").write_text(box + "fail nvmlDeviceGetPowerUsage 3\nlost 1 4\n")
    said = attempt(here, library, 7) + attempt(here, library, -1)
    return Tracked(here / "run", said)


def attempt(here: Path, library: Path, kill_at: int) -> str:
    """Run both ranks to their end, and return what rank 0 printed."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("CUDA_", "WANDB_"))},
        "FAKE_NVML": str(here / "box"), "LD_LIBRARY_PATH": str(library), "CUDA_VISIBLE_DEVICES": f"{B},{A}",
        "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(here / "cache"), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MY_SERVICE_TOKEN": SECRET, "GPTOUGHTS_STALL_SECONDS": "0",
    }  # fmt: skip
    words = [sys.executable, "-m", "tests.support.track_worker", "run", str(kill_at)]
    ranks = [
        subprocess.Popen(
            words,
            cwd=here,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    printed = [process.communicate(timeout=240)[0] for process in ranks]
    expected = -9 if kill_at > 0 else 0
    assert [process.returncode for process in ranks] == [expected, expected], "\n".join(printed)
    return printed[0]


def numbers(row: dict[str, Any], axis: str = "step") -> dict[str, float]:
    return numbers_and_texts({key: value for key, value in row.items() if key not in (axis, "attempt")})[0]


def test_all_trackers_have_the_same_keys(tracked: Tracked) -> None:
    metrics, system = read(tracked.out / "metrics.jsonl"), rows(tracked.out / "system.jsonl")
    assert len(system) > 4
    ours = {key for row in metrics for key in numbers(row)}
    texts = {key for row in metrics for key in numbers_and_texts(row)[1]}
    sampled = {key for row in system for key in numbers(row, "sample")}
    assert {"train/loss", "eval/loss", "train/hours", "perf/tokens_per_second"} <= ours
    assert {
        "gpu/utilization_max_rank",
        "gpu/memory_bytes",
        "cpu/process_percent_min",
        "memory/system_available_bytes",
    } <= sampled
    assert set(scalars(tracked.out / "tensorboard")) == ours
    assert set(scalars(tracked.out / "tensorboard" / "system_metrics")) == sampled
    logged = history(tracked.wandb_files()[0])
    assert {key for row in logged for key in row if not key.startswith("samples/")} == ours | texts | sampled | {
        "step",
        "sample",
    }


def test_no_step_or_sample_is_missing_or_doubled(tracked: Tracked) -> None:
    assert {row["attempt"] for row in rows(tracked.out / "metrics.jsonl")} == {1, 2}
    train = {row["step"]: row["train/loss"] for row in read(tracked.out / "metrics.jsonl") if "train/loss" in row}
    assert sorted(train) == list(range(1, 13))
    shown = scalars(tracked.out / "tensorboard")
    assert {step: pytest.approx(values) for step, values in shown["train/loss"].items()} == {
        step: [loss] for step, loss in train.items()
    }
    assert sorted(shown["eval/loss"]) == [5, 10, 12] and all(len(values) == 1 for values in shown["eval/loss"].values())
    logged = history(tracked.wandb_files()[0])
    assert Counter((row["step"], row["train/loss"]) for row in logged if "train/loss" in row) == Counter(train.items())
    assert Counter(row["step"] for row in logged if "eval/loss" in row) == Counter([5, 10, 12])
    assert Counter(row["step"] for row in logged if "samples/sample" in row) == Counter([3, 6, 9, 12])
    system = [row["sample"] for row in rows(tracked.out / "system.jsonl")]
    assert system == list(range(1, len(system) + 1))
    assert Counter(row["sample"] for row in logged if "sample" in row) == Counter(system)
    assert sorted(scalars(tracked.out / "tensorboard" / "system_metrics")["cpu/load"]) == system


def test_a_resumed_run_has_one_wandb_id_which_is_in_its_checkpoints(tracked: Tracked) -> None:
    names = {path.parent.name.rpartition("-")[2] for path in tracked.wandb_files()}
    states = [json.loads(path.read_text()) for path in sorted((tracked.out / "checkpoints").glob("step-*/state.json"))]
    assert len(states) == 3 and {state["run"]["run_id"] for state in states} == names
    (run,) = [record.run for record in records(tracked.wandb_files()[0]) if record.WhichOneof("record_type") == "run"]
    assert {run.run_id} == names and list(run.tags) == ["one", "two"] and run.run_group == "tests"
    assert f"upload with: wandb sync {tracked.wandb_files()[0].parent.relative_to(tracked.out.parent)}" in tracked.said


def test_gpu_samples_have_their_own_axis(tracked: Tracked) -> None:
    metrics = [record.metric for record in records(tracked.wandb_files()[0]) if record.WhichOneof("record_type") == "metric"]
    axes = {metric.name or metric.glob_name: metric.step_metric for metric in metrics}
    assert axes["gpu/utilization"] == axes["gpu/utilization_max"] == axes["memory/process_bytes"] == "sample"
    assert axes["train/loss"] == axes["eval/*"] == axes["memory/measured_bytes"] == "step"


def test_ranks_see_their_own_gpus_and_one_that_is_lost_does_not_end_the_run(tracked: Tracked) -> None:
    system = rows(tracked.out / "system.jsonl")
    first = system[0]
    assert first["gpu/count"] == 2 and first["gpu/utilization"] == 70
    assert (first["gpu/utilization_max"], first["gpu/utilization_max_rank"]) == (90, 0), (
        "CUDA_VISIBLE_DEVICES has them reversed"
    )
    assert system[-1]["gpu/count"] == 1 and system[-1]["gpu/utilization_max_rank"] == 1
    assert not any("gpu/power_watts" in row for row in system) and all("gpu/energy_joules" in row for row in system)
    assert tracked.said.count("gpu/power_watts: not read (Not Supported)") == 2, "once per attempt"
    assert f"GPU of rank 0 ({B}): GPU is lost" in tracked.said


def test_secrets_stay_here(tracked: Tracked) -> None:
    assert not [path for path in tracked.out.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_samples_are_in_every_tracker(tracked: Tracked) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    texts = read(tracked.out / "samples.jsonl")
    assert [row["step"] for row in texts] == [3, 6, 9, 12] and all(row["text"] for row in texts)
    events = EventAccumulator(str(tracked.out / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    assert [event.step for event in events.Tensors("samples/sample/text_summary")] == [3, 6, 9, 12]
