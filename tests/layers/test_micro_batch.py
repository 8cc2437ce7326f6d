"""The micro-batch that is found by measuring: it stays within memory, all is put back, and the training is that of the same size by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptoughts.config.model_spec import spec_for
from gptoughts.errors import ConfigError, PlanError, RunError
from gptoughts.hardware.machine import probe
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.layers.microbatch_auto import divisors
from gptoughts.layers.support.micro_batch_search import Trial, _largest
from gptoughts.planning.profile import LayerRequest, Match, Profile
from gptoughts.planning.resolve import resolve
from gptoughts.run import evidence
from tests.support import engines
from tests.support.engines import engine_of, plan_of, random_batches, recipe_of, steps, watched


def trained(recipe: Any, layers: dict[str, Any]) -> tuple[int | None, list[float], list[torch.Tensor]]:
    torch.manual_seed(11)
    with engine_of(recipe, plan_of(recipe, layers), random_batches(recipe, ragged=recipe.objective == "next-token")) as engine:
        losses = steps(engine, 3)
        return engine.micro_batch, losses, [parameter.detach().clone() for parameter in engine.parameters()]


BESIDE = {
    "plain": {},
    "scaler": {"precision": "fp16"},
    "prefetch": {"loader": "prefetch"},
    "on the host": {"optimizer": "fused", "optimizer_offload": "state-on-cpu"},
    "8bit": {"optimizer": "8bit"},
}


@pytest.mark.parametrize("more", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize(
    "family", ["modern", pytest.param("deepseek", marks=pytest.mark.slow), pytest.param("bert", marks=pytest.mark.slow)]
)
def test_the_training_is_that_of_the_same_size_by_hand(family: str, more: dict[str, Any]) -> None:
    """To the bit: trials leave no trace in weights, state, batches, random draws, scaler or loads of experts."""
    if family != "modern" and more:
        pytest.skip("one family tells")
    recipe = recipe_of(family)
    if family == "modern":
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dropout": 0.2})})
    size, losses, weights = trained(recipe, {**more, "microbatch": "auto"})
    by_hand = trained(recipe, {**more, "microbatch": "fixed", "microbatch.sequences": size})
    assert by_hand[0] == size and losses == by_hand[1]
    assert all(torch.equal(one, other) for one, other in zip(weights, by_hand[2], strict=True))


@pytest.mark.parametrize(
    "more",
    [
        {"loss": "fused-ce", "loss.tokens": 16},
        {"recompute": "recompute-ops"},
        {"offload": "offload-activations", "offload.least_bytes": 64},
    ],
    ids=["fused-ce", "recompute-ops", "offload"],
)
def test_layers_that_count_themselves_still_do(more: dict[str, Any]) -> None:
    recipe = recipe_of("modern")
    plan = plan_of(recipe, {**more, "attention": "sdpa", "microbatch": "auto"})
    with engine_of(recipe, plan) as engine:
        seen = evidence.judge(engine, plan, CATALOG, watched(engine))
    assert not evidence.failures(seen), [line.evidence.text for line in evidence.failures(seen)]


def test_no_room_for_the_optimizers_state_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Any, closure: Any = None) -> None:
        torch.empty(2**46)

    recipe = recipe_of("modern")
    plan = plan_of(recipe, {"microbatch": "auto"})
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with (
        pytest.raises(RunError, match="microbatch=auto: a step with 1 sequences per forward ran out of memory"),
        engine_of(recipe, plan),
    ):
        pass


def test_it_stays_within_the_memory_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit lies between what two sizes hold; the larger is not taken, and the watched step holds no more than the limit."""
    monkeypatch.setattr(engines, "BATCH", 16)
    monkeypatch.setattr(engines, "LENGTH", 64)
    recipe, held = recipe_of("modern"), {}
    for size in (2, 16):
        with engine_of(recipe, plan_of(recipe, {"microbatch": "fixed", "microbatch.sequences": size})) as engine:
            held[size] = watched(engine).peak_bytes
    limit = (held[2] + held[16]) // 2
    layers = {"microbatch": "auto", "microbatch.memory_gib": limit / 2**30}
    with engine_of(recipe, plan_of(recipe, layers)) as engine:
        assert engine.micro_batch is not None and engine.micro_batch < 16
        trace = watched(engine)
        proof = CATALOG["auto"].verify(engine, trace, {"sequences": None, "memory_gib": None})
    assert trace.peak_bytes <= limit * 1.02 and str(proof.status) == "active", proof.text


def test_too_little_memory_for_one_sequence_is_one_message() -> None:
    recipe = recipe_of("modern")
    plan = plan_of(recipe, {"microbatch": "auto", "microbatch.memory_gib": 1e-6})
    told = r"microbatch=auto: a step with 1 sequences per forward takes [0-9]+ MiB, available 1 KiB.\n  Try: gptoughts plan"
    with pytest.raises(RunError, match=told), engine_of(recipe, plan):
        pass


def test_a_backward_that_updates_cannot_be_tried() -> None:
    recipe = recipe_of("modern")
    recipe = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"clip_norm": 0.0})})
    with pytest.raises(PlanError, match="in-backward and auto clash"):
        plan_of(recipe, {"microbatch": "auto", "update": "in-backward"})


def test_the_former_name_is_an_error_that_names_the_new_one() -> None:
    recipe = recipe_of("modern")
    with pytest.raises(ConfigError, match=r"--layer.microbatch: no layer 'fit' in this slot \(did you mean 'auto'\?\)"):
        plan_of(recipe, {"microbatch": "fit"})
    profile = Profile("mine", "", False, Match(), {"microbatch": (LayerRequest("fit", {}, "mine.toml"),)}, "mine.toml")
    with pytest.raises(
        ConfigError, match=r"mine.toml: slots.microbatch: no layer 'fit' in this slot \(did you mean 'auto'\?\)"
    ):
        resolve(profile, probe(), spec_for(recipe), recipe, World(), CATALOG)


def test_sizes_cut_the_share_evenly() -> None:
    assert divisors(12, None) == [1, 2, 3, 4, 6, 12] and divisors(12, 4) == [1, 2, 3, 4] and divisors(7, 3) == [1]


@pytest.mark.parametrize(
    ("peaks", "room", "wanted"),
    [({1: 10, 2: 14}, 30, 6), ({1: 10, 2: 14}, 13, 1), ({1: 10, 2: 10}, 11, 12), ({1: 10}, 100, 1), ({1: 10, 2: 40}, 20, 1)],
)
def test_a_line_through_two_trials_says_what_the_largest_may_be(peaks: dict[int, int], room: int, wanted: int) -> None:
    trials = {size: Trial(size, peak, 1.0) for size, peak in peaks.items()}
    assert _largest(trials, [1, 2, 3, 4, 6, 12], room) == wanted
