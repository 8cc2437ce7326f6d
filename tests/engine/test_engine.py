"""Verbs are wrapped and replaced and put back; parameters get memory, values and ties, or a named error."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine, allocate
from gptoughts.engine.objectives.base import NextToken
from gptoughts.errors import LayerError, RunError
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.models.family import FAMILIES
from gptoughts.models.sources import Initialization, meta_model
from gptoughts.planning.layer import Layer, active
from tests.support.engines import ROWS, engine_of, plan_of, random_batches, recipe_of, steps

CPU = torch.device("cpu")


def bare(**more: Any) -> Engine:
    recipe = recipe_of("modern", **more)
    family = FAMILIES["gpt"]
    return Engine(
        meta_model(recipe, family, ROWS), family, NextToken(), recipe, Ranks(World(), CPU), CPU, batches=random_batches(recipe)
    )


def test_contexts_nest_in_the_order_in_which_they_were_pushed() -> None:
    engine, seen = bare(), []

    def factory(name: str) -> Any:
        @contextmanager
        def context() -> Any:
            seen.append(f"in {name}")
            yield
            seen.append(f"out {name}")

        return context

    undo = [engine.wrap_context("forward_context", factory(name)) for name in ("outer", "inner")]
    with engine.forward_context():
        pass
    with engine.forward_context():  # factories make a fresh context each time
        pass
    assert seen == ["in outer", "in inner", "out inner", "out outer"] * 2
    for back in undo:
        back()
    with engine.forward_context():
        pass
    assert len(seen) == 8


def test_a_replaced_verb_is_called_and_put_back() -> None:
    engine = bare()
    before = dict(engine._hooks)
    back = engine.wrap("step", lambda inner: not inner())
    undo = engine.replace("step", lambda: False)  # a later slot's replacement stays inside an earlier slot's wrapper
    assert engine.step() is True
    back()
    assert engine.step() is False
    undo()
    assert engine._hooks == before
    assert not any(engine._wrappers.values())


def test_materialize_fills_ties_and_buffers() -> None:
    engine = bare()
    assert engine.bare.embed.weight.is_meta
    engine.materialize(Initialization(engine.family, engine.recipe.model, 7))
    assert not any(parameter.is_meta for parameter in engine.bare.parameters())
    assert engine.bare.head.weight is engine.bare.embed.weight
    assert not engine.bare.cos.is_meta
    again = bare()
    again.materialize(Initialization(again.family, again.recipe.model, 7))
    for one, two in zip(engine.bare.parameters(), again.bare.parameters(), strict=True):
        assert torch.equal(one, two)


class Partial:
    def __init__(self, missing: str = "", extra: str = "", shape: bool = False) -> None:
        self.missing, self.extra, self.shape = missing, extra, shape

    def tensor(self, name: str, shape: torch.Size) -> torch.Tensor | None:
        if name == self.missing:
            return None
        return torch.zeros(3) if self.shape else torch.zeros(shape)

    def buffer(self, name: str) -> None:
        return None

    def unused(self) -> list[str]:
        return [self.extra] if self.extra else []


def test_parameters_that_no_source_wrote_and_keys_that_nobody_used_are_named() -> None:
    with pytest.raises(
        RunError, match=r"missing in the source: blocks.1.mlp.down.weight\n.*unused in the source: lm_head.bias"
    ):
        bare().materialize(Partial(missing="blocks.1.mlp.down.weight", extra="lm_head.bias"))
    with pytest.raises(RunError, match=r"embed.weight: the model needs shape \(128, 64\). Found shape \(3,\)"):
        bare().materialize(Partial(shape=True))


def test_allocation_keeps_real_values_and_ties() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    value = model["a"].weight.detach().clone()
    with torch.device("meta"):
        model["c"] = torch.nn.Linear(2, 2)
    allocate(model, CPU)
    assert torch.equal(model["a"].weight, value)
    assert model["b"].weight is model["a"].weight
    assert not model["c"].weight.is_meta


def test_a_layer_that_cannot_be_applied_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def broken(engine: Any, options: Any) -> Any:
        raise OSError("libbroken.so: undefined symbol")
        yield

    layer = Layer(name="tf32", slot="matmul", card="Broken.", apply=broken, verify=lambda *_: active(""))
    recipe = recipe_of("modern")
    plan = plan_of(recipe)
    monkeypatch.setitem(CATALOG, "ieee", layer)
    with pytest.raises(LayerError, match=r"matmul=tf32: could not be applied: OSError: libbroken.so"), engine_of(recipe, plan):
        pass


def test_layers_are_undone_when_training_fails() -> None:
    recipe = recipe_of("modern")
    threads = torch.get_num_threads()
    with (
        pytest.raises(ZeroDivisionError),
        engine_of(recipe, plan_of(recipe, {"attention": "sdpa", "precision": "bf16"})) as engine,
    ):
        raise ZeroDivisionError
    assert not engine._contexts["forward_context"]
    assert torch.get_num_threads() == threads


def test_micro_batches_share_the_rows_and_every_key() -> None:
    engine = bare()
    engine.micro_batch = 3
    batch = {"input_ids": torch.arange(8).reshape(4, 2), "labels": torch.arange(8).reshape(4, 2)}
    parts = engine.micro_batches(batch)
    assert [len(part["input_ids"]) for part in parts] == [3, 1]
    assert torch.equal(torch.cat([part["labels"] for part in parts]), batch["labels"])


def test_training_lowers_the_loss() -> None:
    recipe = recipe_of("modern")
    batch = next(random_batches(recipe))
    with engine_of(recipe, plan_of(recipe), iter([batch] * 30)) as engine:
        losses = steps(engine, 30)
    assert losses[-1] < losses[0] - 0.5
