"""Parameter groups cover every parameter once; schedules begin, end and bend where they say."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptoughts.config.recipe import OptimConfig
from gptoughts.engine.optim.lr_schedule import learning_rate, set_rate
from gptoughts.engine.optim.param_groups import adamw, groups
from gptoughts.errors import ConfigError
from gptoughts.models.family import FAMILIES
from tests.support.engines import FAMILIES_UNDER_TEST, recipe_of

SHAPES = st.sampled_from(["cosine", "linear", "wsd", "constant"])


@pytest.mark.parametrize("family", sorted(FAMILIES_UNDER_TEST))
@pytest.mark.parametrize("tied", [True, False])
def test_groups_cover_every_parameter_exactly_once(family: str, tied: bool) -> None:
    recipe = recipe_of(family)
    config = recipe.model.model_copy(update={"tied": tied})
    model = FAMILIES["gpt"].build(config, 128, 32)
    made = groups(model, recipe.optim)
    inside = [id(parameter) for group in made for parameter in group["params"]]
    assert sorted(inside) == sorted(id(parameter) for parameter in model.parameters())
    assert all(parameter.dim() >= 2 for parameter in made[0]["params"])
    assert all(parameter.dim() < 2 for parameter in made[1]["params"])
    assert made[0]["weight_decay"] == recipe.optim.weight_decay
    assert made[1]["weight_decay"] == 0.0


def test_frozen_parameters_are_left_out_and_a_wholly_frozen_model_is_an_error() -> None:
    model = torch.nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    assert [len(group["params"]) for group in groups(model, OptimConfig())] == [1]
    model.weight.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter has requires_grad"):
        groups(model, OptimConfig())


@given(SHAPES, st.integers(0, 50), st.integers(60, 500))
def test_the_rate_warms_up_to_the_peak_and_ends_at_the_least(shape: str, warmup: int, steps: int) -> None:
    config = OptimConfig(schedule=shape, warmup_steps=warmup, learning_rate=1.0, min_learning_rate=0.1)  # type: ignore[arg-type]
    last = steps - 1
    rates = [learning_rate(config, step, step / last, warmup / last) for step in range(steps)]
    assert all(0 < rate <= 1.0 + 1e-12 for rate in rates)
    assert all(a < b for a, b in itertools.pairwise(rates[: warmup + 1]))
    assert rates[warmup] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(1.0 if shape == "constant" else 0.1)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates[warmup:]))


def test_wsd_stays_and_then_falls_over_its_last_share() -> None:
    config = OptimConfig(schedule="wsd", warmup_steps=0, learning_rate=1.0, min_learning_rate=0.0, decay_fraction=0.25)
    assert learning_rate(config, 1, 0.74) == 1.0
    assert learning_rate(config, 1, 0.875) == pytest.approx(0.5)


def test_cosine_is_half_way_down_in_the_middle() -> None:
    config = OptimConfig(schedule="cosine", warmup_steps=0, learning_rate=1.0, min_learning_rate=0.2)
    assert learning_rate(config, 5, 0.5) == pytest.approx(0.6)


def test_set_rate_reaches_every_group() -> None:
    optimizer = adamw(torch.nn.Linear(2, 2), OptimConfig())
    set_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
