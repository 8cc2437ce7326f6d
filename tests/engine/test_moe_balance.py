"""A mixture trained with balance: the gradient is that of main + coefficient x balance, the loss the main loss, loads are counted once, biases even them out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gptoughts.config.recipe import ExpertsConfig
from gptoughts.engine.engine import Engine
from gptoughts.engine.moe_balance import Balanced, add_balance_loss, counted
from gptoughts.engine.objectives.base import NextToken
from gptoughts.engine.trainer import StepStats, train_step
from gptoughts.errors import ConfigError, RunError
from gptoughts.layers import CATALOG
from gptoughts.models.hf.experts import balance
from gptoughts.models.patching import reroute
from tests.support.engines import NEEDS_INDUCTOR, engine_of, plan_of, recipe_of
from tests.support.mixtures import KINDS, engine_for, ids, mixture

COEFFICIENT = 0.1


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(
    model: nn.Module, coefficient: float = COEFFICIENT, micro_batch: int | None = None, rate: float = 1e-2, **more: Any
) -> Engine:
    engine = engine_for(model, {"input_ids": ids(), **more}, micro_batch, rate)
    engine.objective, _ = add_balance_loss(engine, engine.objective, ExpertsConfig(balance_weight=coefficient))
    return engine


def read(engine: Engine, name: str) -> float:
    total, weight = engine.objective.meters[name]
    return float(total / weight)


def gradients(engine: Engine) -> tuple[StepStats, dict[str, torch.Tensor]]:
    """One step and the gradients it stepped with, unclipped."""
    kept: dict[str, torch.Tensor] = {}

    def keep(inner: Any) -> bool:
        kept.update(
            {name: parameter.grad.clone() for name, parameter in engine.bare.named_parameters() if parameter.grad is not None}
        )
        return inner()

    undo = engine.wrap("step", keep)
    engine.replace("clip", lambda: torch.zeros(()))
    stats = train_step(engine, 0.0)
    undo()
    return stats, kept


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_router_and_every_expert_that_was_used(kind: str) -> None:
    engine = trained(mixture(kind))
    _, found = gradients(engine)
    loads = engine.objective.experts.row(engine.objective.experts.percentages().tolist())
    for name, router in engine.objective.experts.found.items():
        router_gradients = [found[f"{name}.{leaf}"] for leaf, one in router.module.named_parameters() if one.requires_grad]
        assert router_gradients and all(one.isfinite().all() and one.abs().sum() > 0 for one in router_gradients)
        holder = f"{name.rpartition('.')[0]}.experts"
        used = torch.tensor(loads[f"experts/{name}"]) > 0
        for leaf, weight in engine.bare.get_submodule(holder).named_parameters():
            if weight.ndim == 3:
                assert torch.equal(found[f"{holder}.{leaf}"].abs().amax((1, 2)) > 0, used)


def test_the_loss_is_the_main_loss_and_the_gradient_that_of_main_plus_coefficient_times_balance() -> None:
    plain, main = gradients(engine_for(mixture(), {"input_ids": ids()}))
    engine = trained(mixture())
    stats, both = gradients(engine)
    assert torch.equal(stats.loss_sum, plain.loss_sum)
    assert read(engine, "balance_loss") > 2

    model, batch = engine.bare, {"input_ids": ids()}
    objective = engine.objective
    model.zero_grad()
    objective.experts.listen(counted(batch, objective.tokens(batch)))
    loss = objective.objective(model, batch) / stats.weight
    (loss + COEFFICIENT * balance(objective.experts.complete(objective.experts.heard()))).backward()
    for name, parameter in model.named_parameters():
        if name in both:
            torch.testing.assert_close(both[name], parameter.grad, rtol=1e-4, atol=1e-7)
    routed = [f"{name}.weight" for name in objective.experts.found]
    assert routed and not any(torch.allclose(both[name], main[name], rtol=1e-2) for name in routed)


def test_without_a_coefficient_the_loss_is_the_main_loss_to_the_bit_and_loads_are_still_told() -> None:
    plain, main = gradients(engine_for(mixture(), {"input_ids": ids()}))
    engine = trained(mixture(), 0.0)
    stats, found = gradients(engine)
    assert torch.equal(stats.loss_sum, plain.loss_sum)
    assert all(torch.equal(found[name], gradient) for name, gradient in main.items())
    assert read(engine, "load_max") > 1
    assert read(engine, "dead_experts") == 0


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_micro_batches_give_the_main_loss_of_one_batch_in_every_implementation(implementation: str) -> None:
    whole, all_at_once = gradients(trained(mixture(), 0.0))
    parts, accumulated = gradients(trained(mixture(implementation=implementation), 0.0, micro_batch=1))
    torch.testing.assert_close(parts.loss_sum / parts.weight, whole.loss_sum / whole.weight, rtol=1e-6, atol=1e-6)
    for name, gradient in all_at_once.items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-4, atol=1e-6)


def test_loads_do_not_depend_on_micro_batches_and_balance_is_their_weighted_mean() -> None:
    rows = []
    for size in (None, 1):
        engine = trained(mixture(), micro_batch=size)
        gradients(engine)
        rows.append((engine.objective.experts.percentages(), read(engine, "balance_loss")))
    assert torch.equal(rows[0][0], rows[1][0])
    single = []
    for row in range(4):
        engine = trained(mixture())
        engine.objective(engine.model, {"input_ids": ids()[row : row + 1]})
        single.append(read(engine, "balance_loss"))
    assert rows[1][1] == pytest.approx(sum(single) / 4, rel=1e-5)


def test_padding_is_not_counted_and_a_prompt_is() -> None:
    labels, positions = ids().clone(), torch.arange(17).repeat(4, 1)
    labels[:, :5] = -100  # the prompt
    labels[:, 10:] = -100  # padding, a document of its own
    positions[:, 10:] -= 10
    batch = {"input_ids": ids(), "labels": labels, "positions": positions}
    assert torch.equal(counted(batch, 64).view(4, 16), (torch.arange(16) < 10).float().expand(4, 16))
    assert counted({"input_ids": ids(), "labels": labels}, 64).sum() == 64  # one document each
    labels[1] = -100
    assert counted({"input_ids": ids(), "labels": labels}, 64).view(4, 16).sum(1).tolist() == [16, 0, 16, 16]
    assert (
        counted({"input_ids": ids()[:, :16], "labels": labels[:, :16]}, 64).sum() == 48
    )  # aligned, as masked diffusion has them


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=6))
def test_counted_is_what_a_loop_over_documents_counts(documents: list[tuple[int, bool]]) -> None:
    positions = torch.cat([torch.arange(size) for size, _ in documents])[None]
    labels = torch.cat([torch.full((size,), 3 if has else -100) for size, has in documents])[None]
    expected = torch.cat([torch.full((size,), float(has)) for size, has in documents])
    assert torch.equal(counted({"input_ids": labels, "labels": labels, "positions": positions}, len(expected)), expected)


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 5), st.integers(0, 50))
def test_few_tokens_and_none_that_count_give_finite_numbers(columns: int, seed: int) -> None:
    model = mixture("deepseek_v3")
    engine = trained(model)
    batch = ids(2, columns, seed)
    labels = batch.clone()
    labels[0] = -100
    for micro_batch in ({"input_ids": batch[:1], "labels": labels[:1]}, {"input_ids": batch[1:], "labels": labels[1:]}):
        engine.objective(model, micro_batch).backward()
    assert all(one.grad.isfinite().all() for one in model.parameters() if one.grad is not None)
    engine.objective.experts.reduce_loads(engine.ranks, 1e-3, engine.objective.meters)
    assert all(torch.isfinite(total / weight) for total, weight in engine.objective.meters.values())


def test_evaluation_has_the_main_loss_alone_and_counts_nothing() -> None:
    engine = trained(mixture())
    batch = {"input_ids": ids()}
    engine.model.eval()
    with torch.no_grad():
        assert torch.equal(engine.objective(engine.model, batch), engine.objective.objective(engine.model, batch))
    assert engine.objective.meters == {}
    engine.step()
    assert engine.objective.experts.percentages() is None


def compiled(engine: Engine) -> None:
    """Blocks as compile-blocks compiles them, with the part of the compiler that may refuse and without the slow one."""
    for block in engine.blocks.values():
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("recompute", "mixtral"),
        ("recompute", "deepseek_v3"),
        ("compile", "mixtral"),
        pytest.param("recompute+compile", "deepseek_v3", marks=pytest.mark.slow),
    ],
)
def test_recompute_and_compile_change_nothing_and_count_once(how: str, kind: str) -> None:
    engine = trained(mixture(kind), micro_batch=2)
    plain, expected = gradients(engine)
    even = engine.objective.experts.percentages()
    engine = trained(mixture(kind), micro_batch=2)
    with ExitStack() as stack:
        if "recompute" in how:
            stack.enter_context(CATALOG["recompute-blocks"].apply(engine, {}))
        if "compile" in how:
            compiled(engine)
        stats, found = gradients(engine)
    torch.testing.assert_close(stats.loss_sum, plain.loss_sum)
    assert torch.equal(engine.objective.experts.percentages(), even)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def test_ten_layers_are_one_graph() -> None:
    from torch._dynamo.utils import counters

    engine = trained(mixture(num_hidden_layers=10))
    counters.clear()
    compiled(engine)
    gradients(engine)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@NEEDS_INDUCTOR
def test_the_catalogs_own_layers_agree_with_it() -> None:
    plain, _ = gradients(trained(mixture()))
    engine = trained(mixture())
    with CATALOG["recompute-blocks"].apply(engine, {}), CATALOG["compile-blocks"].apply(engine, {"cache": "torch"}):
        stats, _ = gradients(engine)
    torch.testing.assert_close(stats.loss_sum, plain.loss_sum, rtol=1e-4, atol=1e-3)


def test_biases_even_out_a_skewed_load() -> None:
    model = mixture("deepseek_v3")
    engine = engine_for(model, {"input_ids": ids(8, 33)}, rate=0.0)
    config = ExpertsConfig(balance_weight=0.0, bias_rate=0.02)
    engine.objective, _ = add_balance_loss(engine, engine.objective, config)
    worst = []
    for _ in range(30):
        engine.objective.meters.clear()
        train_step(engine, 0.0)
        worst.append(read(engine, "load_max"))
    assert worst[0] > 2
    assert sum(worst[-5:]) / 5 < 1.5
    assert any("e_score_correction_bias" in name and value.any() for name, value in model.state_dict().items())


def test_biases_rest_where_no_update_happened_or_the_router_is_frozen() -> None:
    model = mixture("deepseek_v3")
    engine = trained(model)
    undo = engine.replace("step", lambda: False)
    train_step(engine, 0.0)
    undo()
    for router in engine.objective.experts.found.values():
        assert not router.balancing_bias().any()
        for parameter in router.module.parameters():
            parameter.requires_grad_(False)
    train_step(engine, 0.0)
    assert not any(router.balancing_bias().any() for router in engine.objective.experts.found.values())


def test_the_balance_loss_evens_out_a_skewed_load() -> None:
    engine = trained(mixture(), 1.0, rate=0.3)
    engine.objective.meters.clear()
    first = None
    for _ in range(40):
        engine.objective.meters.clear()
        train_step(engine, 0.3)
        first = first or read(engine, "balance_loss")
    assert read(engine, "balance_loss") < 2 + (first - 2) / 3


def test_a_dense_model_is_left_alone() -> None:
    recipe = recipe_of()
    with engine_of(recipe, plan_of(recipe)) as engine:
        objective, undo = add_balance_loss(engine, engine.objective, ExpertsConfig())
        assert objective is engine.objective
        assert engine._wrappers["step"] == []
        undo()


def test_undo_leaves_no_trace() -> None:
    model = mixture()
    engine = engine_for(model, {"input_ids": ids()})
    before = [dict(module.__dict__) for module in model.modules()]
    switch = torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint
    _, undo = add_balance_loss(engine, engine.objective, ExpertsConfig())
    with pytest.raises(ConfigError, match="already patched"):
        add_balance_loss(engine, engine.objective, ExpertsConfig())
    undo()
    assert [list(module.__dict__) for module in model.modules()] == [list(one) for one in before]
    assert engine._wrappers["step"] == []
    assert torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint == switch


def test_what_hides_a_router_is_an_error() -> None:
    engine = trained(mixture())
    name, router = next(iter(engine.objective.experts.found.items()))
    inner = router.module.forward
    undo = reroute(router.module, torch.no_grad()(inner))
    with pytest.raises(RunError, match=f"{name}: routers without a record of the training forward"):
        engine.objective(engine.model, {"input_ids": ids()})
    undo()
    reroute(router.module, lambda hidden: inner(hidden[:, :3] if hidden.ndim == 3 else hidden[:3]))
    with pytest.raises(RunError, match=r"must route 64 positions\. Found 3"):
        engine.objective(engine.model, {"input_ids": ids()})


class Prepared(NextToken):
    def __init__(self) -> None:
        self.meters: dict[str, Any] = {}

    def prepare(self, batch: Any, samples: Any) -> Any:
        return samples


def test_what_else_an_objective_offers_stays() -> None:
    objective = Prepared()
    wrapped = Balanced(objective, None, 0.0)  # type: ignore[arg-type]
    assert wrapped.prepare(None, 7) == 7
    assert wrapped.meters is objective.meters
    with pytest.raises(AttributeError):
        wrapped.nothing  # noqa: B018
