"""Bad steps end the run with their batch on disk, are left out up to a bound, or send the run back; spikes and first losses are named."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from gptoughts.data.batches import Cursor
from gptoughts.data.order import samples_at
from gptoughts.engine.engine import Engine
from gptoughts.engine.trainer import Progress, run_step
from gptoughts.errors import PlanError, RunError
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.planning.layer import Case
from gptoughts.run.loss_spikes import WINDOW, LossSpikes
from gptoughts.run.step_check import Rewind, StepCheck
from tests.support.engines import engine_of, plan_of, probe, random_batches, recipe_of, spec_for

LOSSES = Path(__file__).parent.parent / "golden" / "quickstart-losses.json"
BATCH = 4


def batches(recipe: Any, bad: range) -> Iterator[tuple[dict[str, torch.Tensor], Cursor]]:
    """Random batches with the cursor of a corpus; those with a number in `bad` have no label."""
    for batch, number in random_batches(recipe):
        labels = {"labels": torch.full_like(batch["input_ids"], -100)} if number in bad else {}
        yield {**batch, **labels}, Cursor(number * BATCH, "data")


def run(check: StepCheck, bad: range, count: int, family: str = "modern", **train: Any) -> Engine:
    """Make `count` steps, the callback after each."""
    recipe = recipe_of(family, train={"steps": 100, "global_batch": BATCH, **train})
    with engine_of(recipe, plan_of(recipe), batches(recipe, bad)) as engine:
        engine.model.train()
        progress = Progress()
        for _ in range(count):
            progress, stats = run_step(engine, progress, lambda _: 1e-3)
            check.on_step(engine, progress, stats, False)
        return engine


def test_stop_names_the_batch_and_writes_it(tmp_path: Path) -> None:
    check = StepCheck(tmp_path, sample_numbers=lambda places: samples_at(places, 50, 7))
    with pytest.raises(
        RunError,
        match=r"step 3: no label counts in this batch, samples 8 to 11 of the data order; the batch is in \S*bad-step-000003.safetensors; "
        r"earlier checkpoints are intact. Found loss n/a, gradient norm 0.0.\n  Try: docs/diverging.md; ",
    ):
        run(check, range(3, 4), 5)
    wrong = [batch for batch, _ in zip(random_batches(recipe_of()), range(3), strict=False)][-1][0]
    with safe_open(tmp_path / "bad-step-000003.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("input_ids"), wrong["input_ids"])
        assert file.get_tensor("sample_positions").tolist() == [8, 9, 10, 11]
        assert (
            file.get_tensor("sample_numbers").tolist()
            == samples_at(file.get_tensor("sample_positions").numpy(), 50, 7).tolist()
        )
        assert json.loads(file.metadata()["cursor"]) == {"samples": 12, "fingerprint": "data"}


def test_a_gradient_that_is_not_finite_stops(tmp_path: Path) -> None:
    recipe = recipe_of()
    check = StepCheck(tmp_path)
    with engine_of(recipe, plan_of(recipe)) as engine:
        engine.model.train()
        with torch.no_grad():
            engine.bare.blocks[0].mlp.down.weight.fill_(math.inf)
        progress, stats = run_step(engine, Progress(), lambda _: 1e-3)
        with pytest.raises(
            RunError, match=r"step 1: loss or gradient norm is not finite, up to data cursor 1; .*Found loss nan, grad"
        ):
            check.on_step(engine, progress, stats, False)
    assert (tmp_path / "bad-step-000001.safetensors").is_file()


def test_a_folder_that_cannot_be_written_hides_no_bad_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING), pytest.raises(RunError, match=r"data order; earlier checkpoints"):
        run(StepCheck(tmp_path / "file"), range(1, 2), 1)
    assert "cannot be written" in caplog.text


def test_skip_counts_and_stops_beyond_the_bound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check = StepCheck(tmp_path)
    with caplog.at_level(logging.WARNING):
        run(check, range(2, 4), 6, bad_step="skip", bad_step_limit=2)
    assert check.counts()["train/bad_steps"] == 2 and check.in_a_row == 0
    assert "its update is left out (2 in a row, at most 2)" in caplog.text
    again = StepCheck(tmp_path)
    with pytest.raises(RunError, match=r"step 4: .*; 2 before it were left out \(train.bad_step_limit\)"):
        run(again, range(2, 5), 6, bad_step="skip", bad_step_limit=2)
    resumed = StepCheck(tmp_path)
    resumed.load_state({**again.state(), "in_a_row": 1})
    assert resumed.bad == 2
    with pytest.raises(RunError, match="step 2: "):
        run(resumed, range(1, 3), 6, bad_step="skip", bad_step_limit=2)


def test_rewind_names_how_far_the_data_were_read_until_its_bound(tmp_path: Path) -> None:
    with pytest.raises(Rewind) as caught:
        run(StepCheck(tmp_path, rewinds=2), range(5, 6), 6, bad_step="rewind")
    assert caught.value.samples == 5 * BATCH
    with pytest.raises(RunError, match=r"the run went back 3 times \(train.bad_step_limit\)"):
        run(StepCheck(tmp_path, rewinds=3), range(5, 6), 6, bad_step="rewind")


@pytest.mark.parametrize(
    ("layers", "refused"), [({"update": "in-backward"}, {"skip"}), ({"parallel": "zero1"}, {"skip", "rewind"})]
)
def test_layers_that_cannot_follow_a_policy_are_refused_by_the_plan(layers: dict[str, str], refused: set[str]) -> None:
    optim = {"warmup_steps": 0, "clip_norm": 0.0}
    (name,) = layers.values()
    layer = CATALOG[name]
    for policy in ("stop", "skip", "rewind"):
        recipe = recipe_of(optim=optim, train={"steps": 100, "global_batch": BATCH, "bad_step": policy})
        case = Case(probe(), spec_for(recipe), recipe, World())
        reasons = [reason.text for reason in layer.unmet(case, layer.read_options({}, "the test"))]
        assert any(f"train.bad_step = {policy}" in text for text in reasons) is (policy in refused)
        if policy in refused:
            with pytest.raises(PlanError, match=rf"train.bad_step = {policy}"):
                plan_of(recipe, layers)


# Spikes.


def test_no_spike_in_the_losses_of_quickstart() -> None:
    losses = json.loads(LOSSES.read_text(encoding="utf-8"))
    assert len(losses) > 3 * WINDOW
    spikes = LossSpikes()
    assert [line for step, loss in enumerate(losses, 1) for line in spikes.take(step, loss)] == []


@pytest.mark.parametrize("place", [120, 250, 390])
def test_a_spike_in_them_is_named_once(place: int) -> None:
    losses = json.loads(LOSSES.read_text(encoding="utf-8"))
    losses[place : place + 5] = [loss + 1.5 for loss in losses[place : place + 5]]
    spikes = LossSpikes()
    found = {step: line for step, loss in enumerate(losses) for line in spikes.take(step, loss)}
    assert list(found) == [place] and found[place].startswith(f"loss spike: {losses[place]:.4f}, the median of the ")
    assert spikes.count == 1


@pytest.mark.parametrize("noise", [random.Random(1).gauss, lambda _, spread: random.Random(2).choice((0.0, 0.0))])
def test_noise_and_a_constant_loss_are_no_spike_and_a_new_level_is_one(noise: Any) -> None:
    spikes = LossSpikes()
    lines = [line for step in range(3000) for line in spikes.take(step, 2.0 + noise(0.0, 0.1))]
    assert lines == []
    lines = [line for step in range(3000) for line in spikes.take(step, 4.0 + noise(0.0, 0.1))]
    assert len(lines) == 1


# The first loss.


@pytest.mark.parametrize("family", ["modern", "llada", "llama", "deepseek"])
def test_the_first_loss_of_random_weights_is_what_chance_gives(family: str, caplog: pytest.LogCaptureFixture) -> None:
    recipe = recipe_of(family)
    for factor, named in ((1.0, False), (1.6, True), (0.5, True)):
        check = StepCheck(rows=recipe.model.vocab_size)
        caplog.clear()
        with caplog.at_level(logging.WARNING), engine_of(recipe, plan_of(recipe)) as engine:
            engine.model.train()
            progress, stats = run_step(engine, Progress(), lambda _: 1e-3)
            scaled = type(stats)(**{**vars(stats), "loss_sum": stats.loss_sum * factor})
            check.on_step(engine, progress, scaled, False)
            check.on_step(engine, progress, scaled, False)  # only the first is compared
        assert caplog.text.count("the first loss is") == named, caplog.text
    assert f"{float(scaled.loss_sum / stats.weight):.4f}, random weights give about" in caplog.text
