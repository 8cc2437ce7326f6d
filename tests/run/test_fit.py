"""`gptoughts.fit`: a model of one's own gets the same training as in a bare loop, and every mistake one clear message."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import gptoughts
from gptoughts.config.loader import from_values
from gptoughts.config.model_spec import UNKNOWN
from gptoughts.engine.checkpoint.integrity import damage
from gptoughts.engine.objectives.base import NextToken
from gptoughts.errors import CheckpointError, ConfigError, DataError, LayerError, PlanError
from gptoughts.hardware.machine import read
from gptoughts.hardware.world import World
from gptoughts.inference.load import load
from gptoughts.layers import CATALOG
from gptoughts.planning.layer import Status
from gptoughts.planning.profile import pick
from gptoughts.planning.resolve import resolve

MACHINES = sorted((Path(__file__).parents[1] / "machines").glob("*.json"))
FP32 = {"precision": "fp32"}
OPTIM = {"learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_steps": 2, "weight_decay": 0.05, "clip_norm": 0.5}
STEPS = 9


def model(seed: int = 0) -> nn.Module:
    """A small regressor with weights that decay and biases that do not."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1))


def batches(count: int = 4, rows: int = 8) -> list[dict[str, Tensor]]:
    """Inputs and targets of a smooth function."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(rows, 6, generator=generator) for _ in range(count)]
    return [{"x": x, "y": x.sin().sum(dim=1, keepdim=True)} for x in inputs]


def squared(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The objective: squared errors, summed."""
    return (model(batch["x"]) - batch["y"]).square().sum()


def bare_loop(trained: nn.Module, given: list[dict[str, Tensor]], steps: int) -> list[float]:
    """The same training in plain PyTorch, schedule written out from its definition."""
    import math

    decayed = [p for p in trained.parameters() if p.dim() >= 2]
    kept = [p for p in trained.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": OPTIM["weight_decay"]}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM["learning_rate"], betas=(0.9, 0.95), eps=1e-8)
    warmup, losses = OPTIM["warmup_steps"], []
    for step in range(steps):
        if step < warmup:
            rate = OPTIM["learning_rate"] * (step + 1) / (warmup + 1)
        else:
            share = (step - warmup) / (steps - 1 - warmup)
            span = OPTIM["learning_rate"] - OPTIM["min_learning_rate"]
            rate = OPTIM["min_learning_rate"] + span * 0.5 * (1 + math.cos(math.pi * share))
        batch = given[step % len(given)]
        loss = (trained(batch["x"]) - batch["y"]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), OPTIM["clip_norm"])
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    return losses


def largest_difference(left: nn.Module, right: nn.Module) -> float:
    return max(float((a - b).abs().max().detach()) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def test_same_weights_as_a_bare_loop() -> None:
    ours, plain = model(), model()
    fitted = gptoughts.fit(ours, squared, batches(), steps=STEPS, optim=OPTIM, layers=FP32)
    losses = bare_loop(plain, batches(), STEPS)
    assert largest_difference(ours, plain) < 1e-6
    assert fitted.losses == pytest.approx(losses, abs=1e-6)
    assert largest_difference(ours, model()) > 1e-3, "it was trained at all"
    assert fitted.progress.step == STEPS and [row["step"] for row in fitted.rows] == list(range(1, STEPS + 1))


def test_accumulated_micro_batches_give_the_same_weights() -> None:
    whole, sliced = model(), model()
    gptoughts.fit(whole, squared, batches(), steps=STEPS, optim=OPTIM, layers=FP32)
    layers = {**FP32, "microbatch": "fixed", "microbatch.sequences": 2}
    fitted = gptoughts.fit(sliced, squared, batches(), steps=STEPS, optim=OPTIM, layers=layers)
    assert largest_difference(whole, sliced) < 1e-6
    proof = next(line.evidence for line in fitted.evidence if line.layer == "fixed")
    assert proof.figures == {"forwards": 4, "sequences": 2}


def test_a_weighted_objective_divides_by_its_own_weight() -> None:
    class Squared:
        def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            return (batch["w"] * (model(batch["x"]) - batch["y"]).square()).sum()

        def weight(self, batch: Mapping[str, Tensor]) -> Tensor:
            return batch["w"].sum()

        def tokens(self, batch: Mapping[str, Tensor]) -> int:
            return len(batch["x"])

    ours, plain = model(), model()
    given = [{**batch, "w": torch.tensor([[1.0], [0.0]] * 4)} for batch in batches()]
    gptoughts.fit(ours, Squared(), given, steps=STEPS, optim=OPTIM, layers=FP32)
    bare_loop(plain, [{"x": batch["x"][::2], "y": batch["y"][::2]} for batch in batches()], STEPS)
    assert largest_difference(ours, plain) < 1e-6


def test_own_language_model_with_the_shipped_objective() -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 16)
            self.head = nn.Linear(16, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            logits = self.head(self.embed(ids)).flatten(0, 1)
            return nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")

    torch.manual_seed(0)
    tiny = Tiny()
    given = [{"input_ids": torch.arange(12).repeat(4, 1) % 11}]
    fitted = gptoughts.fit(tiny, NextToken(), given, steps=60, optim={"learning_rate": 0.1}, layers=FP32)
    assert fitted.losses[-1] < 0.5 * fitted.losses[0]
    assert tiny.head.weight is tiny.embed.weight, "tied weights stay one Parameter"
    assert [name for name, _ in tiny.named_parameters()] == ["embed.weight"]


def test_everything_active_and_the_plan_says_why_not() -> None:
    fitted = gptoughts.fit(model(), squared, batches(), steps=3)
    assert {line.evidence.status for line in fitted.evidence} == {Status.ACTIVE}
    table = fitted.plan.table()
    assert "not compile-blocks: needs a model of a known family" in table
    assert "not sdpa: needs a model of a known family" in table


def test_a_layer_that_cannot_apply_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match="attention  sdpa: needs a model of a known family") as error:
        gptoughts.fit(model(), squared, batches(), steps=3, layers={"attention": "sdpa"})
    assert "Try: without --layer.attention" in str(error.value)


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_every_machine_has_a_plan_for_a_model_of_ones_own(path: Path) -> None:
    recipe = from_values({"name": "fit", "train": {"steps": 3}}, "the test").recipe
    machine = read(path)
    plan = resolve(pick("auto", machine), machine, UNKNOWN, recipe, World(), CATALOG)
    assert plan.layers["attention"] == "math" and plan.layers["compile"] == "eager"


def test_run_dir_holds_what_happened(tmp_path: Path) -> None:
    trained = model()
    fitted = gptoughts.fit(trained, squared, batches(), steps=4, layers=FP32, run_dir=str(tmp_path / "fit"))
    out = tmp_path / "fit"
    plan = json.loads((out / "plan.json").read_text())
    evidence = json.loads((out / "evidence.json").read_text())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert plan["digest"] == fitted.plan.digest()
    assert evidence["step"] == 1 and {line["status"] for line in evidence["layers"]} == {"active"}
    assert [row["train/loss"] for row in rows] == fitted.losses
    saved = out / "checkpoints" / "step-000004"
    assert (out / "checkpoints" / "latest").read_text().strip() == saved.name
    assert damage(saved) == ""
    again = model(seed=5)
    again.load_state_dict(load_file(saved / "model.safetensors"))
    assert largest_difference(again, trained) == 0
    with pytest.raises(CheckpointError, match=r"model trained by `gptoughts.fit`, which only its own code can build"):
        load(str(saved))


def test_evidence_is_written_before_an_inactive_layer_stops_the_run(tmp_path: Path) -> None:
    frozen = model()
    given = [{"x": torch.zeros(8, 6), "y": torch.zeros(8, 1)}]
    for parameter in frozen.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(LayerError, match="optimizer=plain: no weight changed"):
        layers = {**FP32, "optimizer": "plain"}
        gptoughts.fit(frozen, squared, given, steps=3, optim={"weight_decay": 0.0}, layers=layers, run_dir=str(tmp_path / "r"))
    lines = json.loads((tmp_path / "r" / "evidence.json").read_text())["layers"]
    assert [line["layer"] for line in lines if line["status"] == "inactive"] == ["plain"]


def test_batches_that_end_for_good() -> None:
    with pytest.raises(DataError, match=r"batches: ended after 4\.\n  Try: a list"):
        gptoughts.fit(model(), squared, (batch for batch in batches()), steps=9, layers=FP32)
    with pytest.raises(DataError, match="batches: ended after 0"):
        gptoughts.fit(model(), squared, [], steps=9, layers=FP32)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (torch.zeros(8, 6), "needs a dict of arrays or tensors. Found Tensor"),
        ({}, "needs a dict of arrays or tensors"),
        ({"x": torch.zeros(8, 6), "y": torch.zeros(7, 1)}, "same number of rows.* Found x has 8 rows, y has 7 rows"),
        ({"x": torch.zeros(8, 6), "y": 1.0}, "y has no"),
        ({"x": torch.zeros(0, 6), "y": torch.zeros(0, 1)}, "at least one"),
    ],
)
def test_what_is_no_batch(batch: Any, words: str) -> None:
    with pytest.raises(DataError, match=f"batch 1: .*{words}|batch 1: {words}"):
        gptoughts.fit(model(), squared, [batch], steps=3, layers=FP32)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("mse", "needs a function"),
        (nn.MSELoss, "needs a function"),
        (
            lambda model, batch: (model(batch["x"]) - batch["y"]).square(),
            r"must return a scalar.*shape \(8, 1\).\n  Try: loss.sum",
        ),
        (lambda model, batch: squared(model, batch).item(), "Found float"),
        (lambda model, batch: batch["y"].sum(), "depends on no trainable weight"),
    ],
)
def test_what_is_no_objective(objective: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"objective: .*{words}"):
        gptoughts.fit(model(), objective, batches(), steps=3, layers=FP32)


def test_wrong_settings_are_all_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        gptoughts.fit(model(), squared, batches(), steps=0, optim={"lr": 1e-3, "beta1": 2.0})
    said = str(error.value)
    assert "train.steps" in said and "optim.lr: no such key; use optim.learning_rate" in said and "optim.beta1" in said


def test_numpy_batches_and_a_second_epoch() -> None:
    given = [{key: value.numpy() for key, value in batch.items()} for batch in batches(2)]
    fitted = gptoughts.fit(model(), squared, given, steps=5, layers=FP32)
    assert fitted.progress.cursor == 5 and len(fitted.losses) == 5


def test_plan_is_a_function_however_often_it_is_asked_for() -> None:
    """A module of the same name would take the function's place as soon as somebody imports it."""
    assert not [
        name for name in gptoughts.__all__ if not name.startswith("_") and importlib.util.find_spec(f"gptoughts.{name}")
    ]
    assert gptoughts.plan("quickstart").layers == gptoughts.plan("quickstart").layers
