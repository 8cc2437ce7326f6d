"""Three attempts of one run, in TensorBoard and in wandb's offline folder: the same keys, and each step once with its newest value."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gptoughts.console import HIDDEN
from gptoughts.run.tracking.jsonl import read, rows
from gptoughts.run.tracking.sink import RunInfo, Sinks, make_sinks
from tests.support.tracker_files import history, scalars

pytest.importorskip("tensorboard")
pytest.importorskip("wandb")

SECRET = "of-nobody-0123456789"


def attempt(out: Path, number: int, start: int, end: int) -> None:
    """Log steps `start` + 1 to `end`; rows of training arrive after the validation of the next step, as on a GPU."""
    sinks = Sinks(make_sinks(["tensorboard", "wandb"]))
    recipe = {"name": "run", "data": {"path": f"https://me:{SECRET}@host/data", "text_key": "text"}}
    sinks.start(RunInfo("run", out, number, recipe=recipe, run_id="same", step=start, settings={"tags": "one,two"}))
    late: dict[str, Any] | None = None
    for step in range(start + 1, end + 1):
        if step % 2 == 0:
            sinks.log(step, {"eval/loss": step + number / 10, "train/num_tokens": 8 * step})
        if late is not None:
            sinks.log(step - 1, late)
        late = {"train/loss": step + number / 10, "train/num_tokens": 8 * step, "perf/mfu": None, "perf/limiter": "data"}
        late["train/expert_load"] = [40, 60]
        sinks.sample(
            100 * number + step, {"time": 1e9 + step, "step": step, "gpu/utilization": 50.0, "gpu/throttle": ["power cap"]}
        )
        sinks.text(step, "sample", f"<b>{SECRET}</b>")
    assert late is not None
    sinks.log(end, late)
    sinks.close()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attempt 2 repeats steps 4 and 5; attempt 3 repeats from the beginning of attempt 2 on and gets no further."""
    folder = tmp_path_factory.mktemp("attempts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOME_PASSWORD", SECRET)
        patch.delenv("WANDB_MODE", raising=False)
        for number, start, end in ((1, 0, 5), (2, 3, 7), (3, 3, 5)):
            attempt(folder, number, start, end)
    return folder


def test_each_step_is_there_once_with_its_newest_value(out: Path) -> None:
    expected = {1: 1.1, 2: 2.1, 3: 3.1, 4: 4.3, 5: 5.3}
    assert {row["step"]: row["train/loss"] for row in read(out / "metrics.jsonl") if "train/loss" in row} == expected
    shown = scalars(out / "tensorboard")
    assert {step: pytest.approx(values) for step, values in shown["train/loss"].items()} == {
        step: [value] for step, value in expected.items()
    }
    assert shown["eval/loss"] == {2: [pytest.approx(2.1)], 4: [pytest.approx(4.3)]}
    (file,) = (out / "wandb").glob("offline-run-*/*.wandb")
    assert "-same" in file.parent.name
    logged = history(file)
    assert Counter((row["step"], row["train/loss"]) for row in logged if "train/loss" in row) == Counter(expected.items())
    assert Counter((row["step"], row["eval/loss"]) for row in logged if "eval/loss" in row) == Counter([(2, 2.1), (4, 4.3)])


def test_samples_have_their_own_axis_and_none_is_lost(out: Path) -> None:
    numbers = [101, 102, 103, 104, 105, 204, 205, 206, 207, 304, 305]
    assert [row["sample"] for row in rows(out / "system.jsonl")] == numbers
    assert sorted(scalars(out / "tensorboard" / "system_metrics")["gpu/utilization"]) == numbers
    (file,) = (out / "wandb").glob("offline-run-*/*.wandb")
    assert [row["sample"] for row in history(file) if "sample" in row] == numbers


def test_trackers_have_the_same_keys(out: Path) -> None:
    trained = {"train/loss", "eval/loss", "train/num_tokens", "train/expert_load/0", "train/expert_load/1"}
    sampled = {"time", "step", "gpu/utilization", "gpu/throttle"}
    assert set(scalars(out / "tensorboard")) == trained and set(scalars(out / "tensorboard" / "system_metrics")) == sampled
    (file,) = (out / "wandb").glob("offline-run-*/*.wandb")
    keys = {key for row in history(file) for key in row if not key.startswith("samples/")}
    assert keys == trained | sampled | {"sample", "perf/limiter"}


def test_secrets_are_in_no_file(out: Path) -> None:
    texts = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert [name for name, text in texts.items() if SECRET.encode() in text] == []
    assert HIDDEN.encode() in texts["samples.jsonl"]
