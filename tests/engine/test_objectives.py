"""The base class of objectives, what it offers by default, and objects that do not inherit from it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gptoughts.engine.accumulation import accumulate
from gptoughts.engine.objectives.base import NextToken, Objective, Rows, WrappedObjective, as_objective
from gptoughts.run.log import take_meters
from tests.support.engines import engine_of, plan_of, recipe_of


class Foreign:
    """An objective that inherits nothing, with everything that is optional."""

    def __init__(self) -> None:
        self.forgotten = 0
        self.meters: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, model: Any, batch: Any) -> Tensor:
        loss = model(batch["input_ids"][:, :-1], labels=batch["input_ids"][:, 1:])
        self.meters = {"mine": (loss.detach().clone(), torch.ones(()))}  # a new dict each time
        return loss

    def weight(self, batch: Any) -> float:
        return float(self.tokens(batch))

    def tokens(self, batch: Any) -> int:
        return batch["input_ids"][:, 1:].numel()

    def prepare(self, batch: Any, samples: Any) -> Any:
        return {**batch, "samples": samples}

    def forget(self) -> None:
        self.forgotten += 1


class Least:
    """Only what is required."""

    def __call__(self, model: Any, batch: Any) -> Tensor:
        return model(batch).sum()

    def weight(self, batch: Any) -> float:
        return 2.0

    def tokens(self, batch: Any) -> int:
        return 3


def test_defaults() -> None:
    objective, batch, samples = NextToken(), {"input_ids": np.zeros((2, 3))}, np.arange(2)
    assert objective.prepare(batch, samples) is batch and objective.prepare_validation(batch, samples) is batch
    assert objective.meters == {} and objective.meters is objective.meters and objective.meters is not NextToken().meters
    assert objective.listing() is None
    objective.forget()


def test_validation_is_prepared_as_training_unless_it_has_its_own() -> None:
    class Prepared(NextToken):
        def prepare(self, batch: Any, samples: Any) -> Any:
            return {"prepared": samples}

    assert Prepared().prepare_validation({}, np.arange(1)) == {"prepared": np.arange(1)}


def test_what_is_required() -> None:
    class Half(Objective):
        def __call__(self, model: Any, batch: Any) -> Tensor:
            return torch.zeros(())

    with pytest.raises(TypeError, match="abstract"):
        Half()  # type: ignore[abstract]


def test_an_object_that_inherits_nothing() -> None:
    given = Foreign()
    adapted = as_objective(given)
    assert isinstance(adapted, Objective)
    samples = np.arange(2)
    assert adapted.prepare({}, samples) == {"samples": samples} == adapted.prepare_validation({}, samples)
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe)) as engine:
        engine.objective = adapted
        batch, _ = engine.next_batch()
        loss = accumulate(engine, batch, torch.ones(()))
        assert adapted.weight(batch) == adapted.tokens(batch) == given.tokens(batch)
        assert adapted.meters is given.meters
        taken = take_meters(engine)
    assert float(taken["mine"][0]) == float(loss) and float(given.meters["mine"][0]) == 0
    adapted.forget()
    assert given.forgotten == 1


def test_a_copy_has_the_object_copied() -> None:
    adapted = as_objective(Foreign())
    twin = copy.copy(adapted)
    twin.forget()
    assert (adapted._given.forgotten, twin._given.forgotten) == (0, 1)


def test_only_what_is_required() -> None:
    adapted = as_objective(Least())
    assert adapted is not None
    assert (adapted.weight({}), adapted.tokens({}), adapted.listing()) == (2.0, 3, None)
    assert adapted.meters == {} and adapted.meters is adapted.meters
    adapted.forget()


def test_what_is_an_objective_already_stays_and_what_is_none_is_refused() -> None:
    objective = Rows(lambda model, batch: torch.zeros(()))
    assert as_objective(objective) is objective
    for wrong in (3, "mse", lambda model, batch: 0, NextToken, Least, torch.nn.MSELoss()):
        assert as_objective(wrong) is None


def test_a_wrapped_objective_asks_the_inner_one() -> None:
    given = Foreign()
    wrapped = WrappedObjective(as_objective(given))
    given.meters = {"mine": (torch.ones(()), torch.ones(()))}
    assert wrapped.meters is given.meters
    assert wrapped.prepare({}, 1) == wrapped.prepare_validation({}, 1) == {"samples": 1}
    wrapped.forget()
    assert given.forgotten == 1 and wrapped.listing() is None
