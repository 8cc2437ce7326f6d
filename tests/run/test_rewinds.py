"""Runs with bad steps that continue: what they pass over, what they record, and the same bits whether they are killed on the way or not."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gptoughts.errors import RunError
from gptoughts.run.tracking import sink
from gptoughts.run.tracking.jsonl import read, rows
from tests.support.rewind_worker import BATCH, main
from tests.support.tracker_files import history, scalars

ROOT = Path(__file__).parents[2]
STEPS = 20
REWIND = {"train.bad_step": "rewind"}
SKIP = {"train.bad_step": "skip"}
PASSED = [{"step": 10, "samples": 10 * BATCH, "passed": 13 * BATCH}]
"""The record of a rewind whose weights break after batch 12: step 13 is bad, so it goes back to step 10, and step 11 takes batch 14."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return with_text(tmp_path / "place")


def with_text(folder: Path) -> Path:
    folder.mkdir()
    words = random.Random(3)
    lines = ("".join(words.choice("abcdefgh ") for _ in range(60)) for _ in range(300))
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def options(policy: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What the worker reads; `more` may hold `fields`, else its options."""
    return {**more, "fields": {"train.steps": STEPS, **policy, **more.get("fields", {})}}


def child(folder: Path, values: dict[str, Any], ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Train in another process, with the threads of this one."""
    words = ["-m", "tests.support.rewind_worker", str(folder), json.dumps(values)]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*start, *words] if ranks > 1 else [sys.executable, *words]
    variables = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=400)


def whole(folder: Path, values: dict[str, Any], ranks: int) -> str:
    """Train to the end: one rank in this process, several in others. Returns what was printed."""
    if ranks > 1:
        ran = child(folder, values, ranks)
        assert ran.returncode == 0, ran.stderr[-3000:]
        return ran.stdout + ran.stderr
    text = StringIO()
    with redirect_stdout(text), redirect_stderr(text):
        main(folder, values)
    return text.getvalue()


def weights(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by file: weights, moments, generators."""
    at = folder / "run" / "checkpoints" / f"step-{step:06d}"
    found = {f"{path.name}/{name}": value for path in at.glob("*.safetensors") for name, value in load_file(path).items()}
    assert len(found) > 10
    return found


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def record(folder: Path) -> Any:
    return json.loads((folder / "run" / "rewinds.json").read_text(encoding="utf-8"))


def state(folder: Path, step: int = STEPS) -> Any:
    path = folder / "run" / "checkpoints" / f"step-{step:06d}" / "state.json"
    return json.loads(path.read_text(encoding="utf-8"))["run"]


def samples_reached(folder: Path, step: int = STEPS) -> int:
    return int(state(folder, step)["progress"]["cursor"]["samples"])


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in read(folder / "run" / "metrics.jsonl") if "train/loss" in row}


def test_a_rewind_passes_over_the_data_and_each_step_has_one_row_and_one_point(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In metrics.jsonl as it is read, in wandb's offline folder and in TensorBoard."""
    monkeypatch.setattr(sink, "CLOSE_SECONDS", 200.0)  # on a busy machine wandb starts slower than this run ends
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracked = {"track.sinks": "wandb,tensorboard", **REWIND}
    said = whole(place, options(tracked, weights=[12]), 1)
    assert "step 13: loss or gradient norm is not finite, samples 48 to 51 of the data order; going back" in said
    assert "samples 40 to 51 of the data order are passed over, after 1 rewind" in said
    assert "first loss" not in said and "spike" not in said
    assert record(place) == PASSED and samples_reached(place) == (STEPS + 3) * BATCH
    written = [row for row in read(place / "run" / "metrics.jsonl") if "train/loss" in row]
    assert [(row["step"], row["attempt"]) for row in written] == [(step, 1 + (step > 10)) for step in range(1, STEPS + 1)]
    assert {row["train/bad_steps"] for row in written if row["step"] > 10} == {1}
    assert max(row["step"] for row in rows(place / "run" / "metrics.jsonl") if row["attempt"] == 1) in (12, 13)
    expected = {row["step"]: pytest.approx(row["train/loss"]) for row in written}
    (file,) = (place / "run" / "wandb").glob("offline-run-*/*.wandb")
    logged = [row for row in history(file) if "train/loss" in row]
    assert Counter(row["step"] for row in logged) == Counter(expected.keys())
    assert {row["step"]: row["train/loss"] for row in logged} == expected
    assert scalars(place / "run" / "tensorboard")["train/loss"] == {step: [loss] for step, loss in expected.items()}
    with safe_open(place / "run" / "bad-step-000013.safetensors", "pt") as file:
        assert file.get_tensor("sample_positions").tolist() == list(range(12 * BATCH, 13 * BATCH))
        assert file.get_tensor("input_ids").shape[0] == BATCH
    ends = [one["end"] for one in json.loads((place / "run" / "goodput.json").read_text(encoding="utf-8"))["attempts"]]
    assert ends == ["rewound", "finished"]


def test_before_the_first_checkpoint_it_goes_back_to_the_start_and_a_bound_stops_it(place: Path) -> None:
    """Bad steps at batches 3 and 6, both before step 5: the second rewind passes over the data of the first one too."""
    with pytest.raises(RunError, match=r"the run went back 2 times \(train.bad_step_limit\); the batch is in "):
        main(place, options({**REWIND, "train.bad_step_limit": 2}, weights=[2, 5, 10]))
    assert record(place) == [
        {"step": 0, "samples": 0, "passed": 3 * BATCH},
        {"step": 0, "samples": 0, "passed": 6 * BATCH},
    ]
    assert {row["attempt"] for row in rows(place / "run" / "metrics.jsonl")} == {1, 2, 3}


def test_weights_that_an_update_breaks_before_a_save_go_back_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update of step 10 has a finite gradient, and the checkpoint after it would hold weights that are not."""
    from gptoughts.run import saving

    broken = iter([[], ["embed.weight"]])
    monkeypatch.setattr(saving, "not_finite", lambda engine: next(broken, []))
    main(place, options({**REWIND, "train.steps": 10}))
    assert record(place) == [{"step": 5, "samples": 5 * BATCH, "passed": 10 * BATCH}]
    assert samples_reached(place, 10) == 15 * BATCH


def test_a_run_names_its_first_loss_and_its_spikes(place: Path) -> None:
    """And counts them in every row; a loss that is doubled is far from what chance gives."""
    said = whole(place, options({"train.steps": 30}, doubled=[1, 25, 26, 29]), 1)
    assert said.count("the first loss is ") == 1 and "warning: step 1: the first loss is 8." in said
    assert (
        "warning: step 25: loss spike: " in said and "warning: step 29: loss spike: " in said and said.count("loss spike") == 2
    )
    counted = {row["step"]: row["train/loss_spikes"] for row in read(place / "run" / "metrics.jsonl") if "train/loss" in row}
    assert [counted[step] for step in (24, 25, 26, 28, 29, 30)] == [0, 1, 1, 1, 2, 2]


KILLS = {
    # kind: worker's options, its policy, batch after which it is killed, newest checkpoint then
    "rewind": ({"weights": [12]}, REWIND, 16, 10),
    "skip": ({"losses": [9, 12, 13]}, SKIP, 13, 10),
}  # fmt: skip


def same_after_a_kill(place: Path, other: Path, kind: str, ranks: int = 1, **more: Any) -> None:
    """A run that is killed behind a bad step, and one that is not, reach the same bits."""
    faults, policy, killed, saved = KILLS[kind]
    said = whole(place, options(policy, **faults, **more), ranks)
    assert ("going back" in said) is (kind == "rewind") and ("its update is left out" in said) is (kind == "skip")
    ended = child(other, options(policy, **faults, **more, killed=killed), ranks)
    assert ended.returncode != 0 and samples_reached(other, saved) == saved * BATCH, ended.stderr[-3000:]
    assert not (other / "run" / "checkpoints" / f"step-{saved + 5:06d}").exists()
    said = whole(other, options(policy, **faults, **more), ranks)
    assert ", bit for bit" in said and "going back" not in said
    assert equal(weights(place), weights(other))
    assert losses(place) == losses(other) and len(losses(place)) == STEPS
    if kind == "rewind":
        assert record(other) == record(place) == PASSED
    else:
        assert samples_reached(other) == STEPS * BATCH
        assert state(place)["bad_steps"] == state(other)["bad_steps"] == {"bad": 3, "in_a_row": 0}
        assert [step for step, loss in losses(other).items() if loss is None] == [9, 12, 13]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KILLS)
def test_a_kill_after_a_bad_step_changes_no_bit(kind: str, place: Path, tmp_path: Path) -> None:
    same_after_a_kill(place, with_text(tmp_path / "other"), kind)


@pytest.mark.long
@pytest.mark.parametrize("kind", KILLS)
@pytest.mark.parametrize("model", ["llama", "deepseek_v3"])
def test_nor_in_a_model_of_hugging_face(model: str, kind: str, place: Path, tmp_path: Path) -> None:
    same_after_a_kill(place, with_text(tmp_path / "other"), kind, hf=model)


@pytest.mark.long
@pytest.mark.parametrize("kind", KILLS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_nor_on_two_ranks(strategy: str, kind: str, place: Path, tmp_path: Path) -> None:
    same_after_a_kill(place, with_text(tmp_path / "other"), kind, 2, layers={"parallel": strategy})


@pytest.mark.long
def test_two_ranks_rewind_together_and_one_of_them_tells(place: Path) -> None:
    ran = child(place, options(REWIND, weights=[12]), ranks=2)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert record(place) == PASSED and samples_reached(place) == (STEPS + 3) * BATCH
    assert (ran.stdout + ran.stderr).count("going back") == 1
    assert {path.name for path in (place / "run").glob("bad-step-*")} == {
        f"bad-step-000013-rank{rank}.safetensors" for rank in (0, 1)
    }


@pytest.mark.long
@pytest.mark.parametrize("layers", [{"update": "in-backward"}, {"precision": "fp16"}])
def test_layers_with_an_update_of_their_own_go_back(layers: dict[str, str], place: Path) -> None:
    """An update in the backward cannot be left out; fp16 leaves out its overflows by itself, which are no bad steps."""
    fields = {"optim.clip_norm": 0.0} if "update" in layers else {}
    main(place, options(REWIND, weights=[12], layers=layers, fields=fields))
    assert record(place) == PASSED
