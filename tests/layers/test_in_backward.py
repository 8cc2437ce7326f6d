"""Updates in the backward: the same weights bit for bit, one update a parameter, gradients never all at once, and who must refuse it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gptoughts.config.model_spec import spec_for
from gptoughts.engine.engine import Engine
from gptoughts.engine.optim.param_groups import Group
from gptoughts.engine.trainer import Progress, run_step
from gptoughts.errors import LayerError, PlanError
from gptoughts.hardware.machine import probe
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.planning.layer import Case, Kind, Status
from tests.support.engines import engine_of, plan_of, recipe_of, watched

LAYER = CATALOG["in-backward"]
UNCLIPPED = {"warmup_steps": 0, "learning_rate": 1e-3, "clip_norm": 0}


def recipe_without_clipping(family: str = "modern", **optim: Any) -> Any:
    return recipe_of(family, optim={**UNCLIPPED, **optim})


def run(engine: Engine, count: int = 3) -> list[float]:
    """Gradient norms of `count` updates, each at a rate of its own."""
    progress, norms = Progress(), []
    engine.model.train()
    for _ in range(count):
        progress, stats = run_step(engine, progress, lambda done: 1e-3 * (done.step + 1))
        norms.append(float(stats.grad_norm))
    return norms


def reached(family: str, layers: dict[str, Any]) -> tuple[list[float], list[Tensor]]:
    recipe = recipe_without_clipping(family)
    with engine_of(recipe, plan_of(recipe, layers)) as engine:
        return run(engine), [parameter.detach().clone() for parameter in engine.parameters()]


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("modern", {"optimizer": "plain"}),
        ("modern", {"optimizer": "fused", "recompute": "recompute-blocks", "loss": "fused-ce", "loss.tokens": 32}),
        ("modern", {"recompute": "recompute-ops", "offload": "offload-activations", "offload.least_bytes": 1024}),
        ("modern", {"precision": "bf16", "optimizer_offload": "state-on-cpu"}),
        ("llama", {"optimizer": "fused"}),
        ("deepseek", {"optimizer": "plain"}),
    ],
)
def test_weights_are_those_of_the_plain_order(family: str, layers: dict[str, Any]) -> None:
    """Bit for bit, with a rate that changes at every step, and the norm that the log shows is the same."""
    norms, weights = reached(family, layers)
    its_norms, its_weights = reached(family, {**layers, "update": "in-backward"})
    assert all(torch.equal(one, other) for one, other in zip(weights, its_weights, strict=True))
    assert its_norms == pytest.approx(norms, rel=1e-6)


def live_bytes(engine: Engine) -> int:
    return sum(parameter.grad.nbytes for parameter in engine.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("family", ["modern", "llama"])
def test_gradients_never_exist_all_at_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_without_clipping(family)
    most: list[int] = []
    with engine_of(recipe, plan_of(recipe)) as engine:
        engine.wrap("step", lambda inner: (most.append(live_bytes(engine)), inner())[1])
        run(engine, 1)
        everything = 4 * sum(parameter.numel() for parameter in engine.parameters())
        assert most == [everything]
    most.clear()
    from gptoughts.engine.optim import param_groups as optim

    inner = optim.step_one

    def noted(optimizer: torch.optim.Optimizer, group: Group, parameter: Tensor) -> None:
        most.append(live_bytes(engine))
        inner(optimizer, group, parameter)

    monkeypatch.setattr(optim, "step_one", noted)
    with engine_of(recipe, plan_of(recipe, {"update": "in-backward"})) as engine:
        run(engine, 1)
        assert live_bytes(engine) == 0
        assert max(most) == max(4 * parameter.numel() for parameter in engine.parameters()) < everything / 4


def test_tied_weights_get_one_update_with_the_whole_gradient() -> None:
    recipe = recipe_without_clipping()
    with engine_of(recipe, plan_of(recipe, {"update": "in-backward"})) as engine:
        assert engine.optimizer is not None
        assert engine.bare.get_parameter("embed.weight") is engine.bare.head.weight  # type: ignore[union-attr]
        run(engine, 3)
        counts = [float(state["step"]) for state in engine.optimizer.state.values()]
        assert counts == [3.0] * len(engine.parameters())
        assert engine.counters.call_counts["in-backward"] == 3 * len(engine.parameters())


def test_a_parameter_left_out_is_noticed_and_hooks_are_gone_afterwards() -> None:
    recipe = recipe_without_clipping()
    with engine_of(recipe, plan_of(recipe, {"update": "in-backward"})) as engine:
        left_out = engine.parameters()[3]
        hooks = left_out._post_accumulate_grad_hooks
        assert len(hooks) == 1
        hooks.clear()
        proof = LAYER.verify(engine, watched(engine), {})
        assert proof.status is Status.INACTIVE and "1 gradients left" in proof.text
    assert not any(parameter._post_accumulate_grad_hooks for parameter in engine.parameters())


def test_a_second_micro_batch_stops_the_run() -> None:
    """As when a layer splits the batch after memory ran out: the first part must not move the weights alone."""
    recipe = recipe_without_clipping()
    with engine_of(recipe, plan_of(recipe, {"update": "in-backward"})) as engine:
        before = [parameter.detach().clone() for parameter in engine.parameters()]
        engine.micro_batch = 2
        with pytest.raises(LayerError, match="several micro-batches"):
            run(engine, 1)
        assert all(torch.equal(old, new) for old, new in zip(before, engine.parameters(), strict=True))


def reasons(recipe: Any, world: World | None = None, **micro_batch: Any) -> list[str]:
    case = Case(probe(), spec_for(recipe), recipe, world or World(), micro_batch=micro_batch)
    return [str(reason) for reason in LAYER.rejections(case, {}) if reason.kind is Kind.UNSUPPORTED]


def test_refusals_name_what_to_type() -> None:
    assert reasons(recipe_without_clipping()) == []
    assert "optim.clip_norm = 1 needs all gradients" in reasons(recipe_of("modern"))[0]
    assert "(--optim.clip-norm 0)" in reasons(recipe_of("modern"))[0]
    assert "optim.name is lion" in reasons(recipe_without_clipping(name="lion"))[0]
    assert "micro-batches of 2 of 4 sequences" in reasons(recipe_without_clipping(), sequences=2)[0]
    assert "ranks average gradients" in reasons(recipe_without_clipping(), World(0, 0, 2, 2, "torchrun"))[0]


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ({"precision": "fp16"}, "fp16 and in-backward clash"),
        ({"microbatch": "fixed", "microbatch.sequences": 2}, "micro-batches of 2 of 4"),
    ],
)
def test_layers_that_cannot_stand_beside_it(layers: dict[str, Any], told: str) -> None:
    with pytest.raises(PlanError, match=told):
        plan_of(recipe_without_clipping(), {"update": "in-backward", **layers})
