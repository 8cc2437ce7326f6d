"""Before the first step layers are compared with the baseline on the run's own weights; one that computes something else stops the run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoughts.errors import ConfigError, LayerError
from gptoughts.layers import CATALOG
from gptoughts.models.sources import Initialization, meta_model
from gptoughts.planning.layer import Layer
from gptoughts.run import numerics_check as numerics
from tests.support.engines import FAMILIES_UNDER_TEST, ROWS, family_for, objective_for, plan_of, random_batches, recipe_of


def compared(family: str, layers: dict[str, Any], catalog: dict[str, Layer] | None = None) -> numerics.Numerics:
    recipe = recipe_of(family)
    port, plan = family_for(recipe), plan_of(recipe, layers)
    batch, _ = next(random_batches(recipe, ragged=recipe.objective == "next-token"))
    return numerics.compare(
        recipe, plan, catalog or CATALOG, port, objective_for(recipe), torch.device("cpu"), batch=batch,
        model=lambda: meta_model(recipe, port, ROWS), weights=lambda model: Initialization(port, recipe.model, recipe.seed),
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES_UNDER_TEST)
def test_sound_layers_are_near(family: str) -> None:
    layers = {"attention": "sdpa", "precision": "bf16"} | ({} if family == "bert" else {"loss": "fused-ce", "loss.tokens": 16})
    found = compared(family, layers)
    assert [one.slot for one in found.compared] == [slot for slot in ("attention", "precision", "loss") if slot in layers]
    assert all(one.near for one in found.compared), [str(one) for one in found.compared]
    assert not found.left_out
    found.demand()
    assert json.loads(json.dumps(found.to_json()))["compared"][0]["near"]


def test_dropout_is_no_difference() -> None:
    recipe = recipe_of("modern")
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dropout": 0.4})})
    port, before = family_for(recipe), torch.get_rng_state()
    batch, _ = next(random_batches(recipe))
    found = numerics.compare(
        recipe, plan_of(recipe, {"attention": "sdpa"}), CATALOG, port, objective_for(recipe), torch.device("cpu"), batch=batch,
        model=lambda: meta_model(recipe, port, ROWS), weights=lambda model: Initialization(port, recipe.model, recipe.seed),
    )  # fmt: skip
    assert found.near and torch.equal(torch.get_rng_state(), before)


def test_a_scaler_at_its_own_scale_is_near() -> None:
    """The gradient of a sum over tokens would leave float16's range; a step's does not."""
    found = compared("modern", {"attention": "sdpa", "precision": "fp16"})
    assert found.near and found.compared[1].cosine > 0.99, [str(one) for one in found.compared]


def test_nothing_is_asked_of_a_plan_of_baselines() -> None:
    assert compared("modern", {}) == numerics.Numerics((), (), 0.0)


def with_broken_attention(factor: float) -> dict[str, Layer]:
    """A catalog whose fused attention looks ahead, or multiplies its output."""
    sound = CATALOG["sdpa"]

    @contextmanager
    def apply(engine: Any, options: Any) -> Iterator[None]:
        with sound.apply(engine, options):
            from gptoughts.models.gpt.sdpa import attend as right

            def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, *more: Any) -> torch.Tensor:
                return (
                    right(query, key, value, False, *more) if factor == 0 else factor * right(query, key, value, causal, *more)
                )

            undo = engine.family.set_attention(engine.bare, attend)
            try:
                yield
            finally:
                undo()

    return {**CATALOG, "sdpa": replace(sound, apply=apply)}


@pytest.mark.parametrize("factor", [0, 2.0, float("nan")], ids=["looks ahead", "twice too much", "no number"])
def test_a_kernel_that_is_wrong_here_stops_the_run(factor: float) -> None:
    found = compared("modern", {"attention": "sdpa"}, with_broken_attention(factor))
    with pytest.raises(
        LayerError,
        match=r"Numerics check failed: these layers differ from the fp32 eager baseline beyond tolerance\n"
        r"  attention=sdpa: loss (.|\n)*Try: --layer.attention math, or --numerics off",
    ):
        found.demand()


def test_what_there_is_no_time_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "SECONDS", 0.0)
    found = compared("modern", {"attention": "sdpa", "precision": "bf16"})
    assert found.compared == () and found.left_out == ("attention=sdpa", "precision=bf16")
    assert "skipped for time: attention=sdpa, precision=bf16" in "\n".join(found.lines())


@pytest.mark.parametrize("family", ["modern", "llama", "deepseek", "bert"])
def test_the_first_blocks_keep_their_names(family: str) -> None:
    recipe = recipe_of(family)
    port = family_for(recipe)
    whole = [name for name, _ in meta_model(recipe, port, ROWS).named_parameters()]
    short = [name for name, _ in numerics.shortened(meta_model(recipe, port, ROWS), port).named_parameters()]
    assert set(short) <= set(whole) and len(port.blocks(numerics.shortened(meta_model(recipe, port, ROWS), port))) == 2


def test_a_run_writes_what_it_compared_and_can_leave_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptoughts import api

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("text.txt").write_text("some words that come again and again\n" * 200, encoding="utf-8")
    fields = {
        "data.path": "text.txt", "data.tokenizer": "bytes", "data.sequence_length": 16, "model.depth": 3, "model.width": 32, "model.heads": 2,
        "train.steps": 2, "train.global_batch": 2, "eval.batches": 1, "sample.tokens": 2,
    }  # fmt: skip
    results = {}
    for name, numerics_ in (("with", "check"), ("without", "off")):
        outcome = api.train("quickstart", fields=fields, layers={"attention": "sdpa"}, run=name, numerics=numerics_)
        results[name] = outcome.val_loss
    assert results["with"] == results["without"], "the comparison changed the training"
    kept = json.loads(Path("out/with/numerics.json").read_text())
    assert kept["compared"][0]["layer"] == "sdpa" and not Path("out/without/numerics.json").exists()
    with pytest.raises(ConfigError, match="must be check or off"):
        api.train("quickstart", fields=fields, run="x", numerics="maybe")
