"""Benchmarks during training: scores at each validation, the picture beside the loss, and everything invalid found before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gptoughts
from gptoughts.errors import ConfigError, DataError
from gptoughts.run.tracking import loss_plot
from gptoughts.run.tracking.jsonl import FILE, Jsonl, read
from gptoughts.run.tracking.sink import RunInfo
from tests.support.hellaswag_rows import ROWS, TEXT, written

PLAIN = {"compile": "eager", "host": "system", "precision": "fp32"}
SCORES = {f"eval/hellaswag_{name}" for name in ("acc", "acc_norm", "acc_bytes", "acc_token", "rows")}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("text.txt").write_text(TEXT * 8, encoding="utf-8")
    written(Path("rows.jsonl"))
    yield tmp_path


def trained(run: str, **more: Any) -> Any:
    values = {
        "name": "tiny", "data.path": "text.txt", "data.tokenizer": "bytes", "data.sequence_length": 96, "train.steps": 4,
        "train.global_batch": 4, "optim.warmup_steps": 0, "eval.every": 2, "eval.batches": 1, "sample.tokens": 4,
        "model.depth": 1, "model.width": 32, "model.heads": 2, "eval.tasks": "hellaswag", "eval.task_data": "rows.jsonl",
        "diffusion.steps": 2, **more,
    }  # fmt: skip
    if values.get("objective") != "masked-diffusion":
        del values["diffusion.steps"]
    return gptoughts.train(values, layers=PLAIN, run=run, verbose=False)


def test_scores_are_logged_at_each_validation_and_resume_leaves_them_out_of_the_fingerprint(here: Path) -> None:
    trained("scored", **{"eval.task_limit": 5})
    rows = [row for row in read(here / "out" / "scored" / FILE) if "eval/loss" in row]
    assert [row["step"] for row in rows] == [2, 4] and all(row.keys() >= SCORES for row in rows)
    assert rows[0]["eval/hellaswag_rows"] == 5 and all(rows[0][name] * 5 % 1 == pytest.approx(0) for name in SCORES)
    # One byte per label but for end-of-text, so bits per byte are at least the loss in bits.
    assert rows[0]["eval/bits_per_byte"] >= rows[0]["eval/loss"] / 0.6931472
    again = trained("scored", **{"train.steps": 6, "eval.task_limit": 3, "optim.schedule": "constant"})
    assert again.progress.step == 6


def test_masked_diffusion_is_scored_too(here: Path) -> None:
    trained("llada", **{"objective": "masked-diffusion", "model.family": "llada", "train.steps": 1, "eval.task_limit": 1})
    assert [row for row in read(here / "out" / "llada" / FILE) if "eval/loss" in row][-1].keys() >= SCORES


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"eval.task_data": "absent.jsonl"}, "absent.jsonl: no such file or folder"),
        ({"eval.task_data": "bad.jsonl"}, "bad.jsonl:2: no field 'label'"),
        ({"eval.tasks": "helaswag"}, r"eval.tasks: no benchmark 'helaswag' \(did you mean 'hellaswag'\?\)"),
        ({"eval.tasks": ""}, "eval.task_data: has no effect"),
        ({"data.val_fraction": 0.0}, "eval.tasks: needs a validation split"),
        ({"data.sequence_length": 16}, "data.sequence_length 16: shorter than a continuation to score"),
    ],
)
def test_what_cannot_be_scored_stops_before_the_first_step(more: dict[str, Any], message: str, here: Path) -> None:
    written(Path("bad.jsonl"), [ROWS[0], {key: value for key, value in ROWS[1].items() if key != "label"}])
    with pytest.raises((ConfigError, DataError), match=message):
        trained("refused", **more)
    assert read(here / "out" / "refused" / FILE) == []


def drawn(here: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> list[list[str]]:
    """Legend entries of each panel of the picture of these rows."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *words, **more: (figures.append(figure), save(figure, *words, **more))
    )
    sink = Jsonl()
    sink.start(RunInfo("drawn", here))
    for step, row in enumerate(rows, 1):
        sink.log(step, {"train/num_tokens": 100 * step, "train/loss": 2.0, **row})
    sink.close()
    loss_plot.draw_losses(here / FILE, here / "loss.png", "drawn")
    assert (here / "loss.png").stat().st_size > 1000
    return [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figures[0].axes]


def test_the_picture_has_hellaswag_beside_the_loss(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {f"eval/hellaswag_{name}": 0.3 for name in ("acc", "acc_norm", "acc_bytes", "acc_token")}
    few = {"eval/loss": 2.1, **scores, "eval/hellaswag_rows": 500}
    losses, panel = drawn(here, monkeypatch, [few, {}, few])
    assert losses == ["training (last 2.000)", "validation (last 2.100)"]
    assert panel == ["acc_norm, per character (last 0.300)", "acc_token, per token (last 0.300)", "chance 0.25"]


def test_published_models_are_drawn_for_the_whole_split_only(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {f"eval/hellaswag_{name}": 0.3 for name in ("acc_norm", "acc_token")}
    _, panel = drawn(here, monkeypatch, [{"eval/loss": 2.1, **scores, "eval/hellaswag_rows": 10_042}])
    assert "GPT-2 124M 0.311 (lm-eval)" in panel and "GPT-3 125M 0.337 (Brown et al. 2020)" in panel


def test_without_hellaswag_there_is_one_panel(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(here, monkeypatch, [{"eval/loss": 2.1}]) == [["training (last 2.000)", "validation (last 2.100)"]]
