"""Router detection without model names, load counts, and the balance loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gptoughts.errors import ConfigError
from gptoughts.models.hf.experts import balance, coefficient, described, measured, routers, update_balancing_bias
from tests.support.mixtures import KINDS, WORDS, config, ids, mixture

SIGMOID = {"deepseek_v3", "glm4_moe", "minimax_m2"}
BIASED = {*SIGMOID, "ernie4_5_moe"}


@pytest.mark.parametrize("kind", KINDS)
def test_routers_are_found_also_on_meta(kind: str) -> None:
    from transformers import AutoModelForCausalLM

    real = routers(mixture(kind))
    with torch.device("meta"):
        meta = routers(AutoModelForCausalLM.from_config(config(kind)))
    assert [name.removeprefix("inner.") for name in real] == list(meta)
    assert len(real) == 2
    for router in (*real.values(), *meta.values()):
        assert router.sigmoid == (kind in SIGMOID)
        assert (router.bias is not None) == (kind in BIASED)
        assert router.module.top_k == router.chosen
    assert described(real).startswith(f"2 x {type(next(iter(real.values())).module).__name__}, ")


@pytest.mark.parametrize("kind", KINDS)
def test_the_balancing_bias_is_saved(kind: str) -> None:
    model = mixture(kind)
    for router in routers(model).values():
        bias = router.balancing_bias()
        if bias is not None:
            assert any(value.data_ptr() == bias.data_ptr() for value in model.state_dict().values())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba"])
def test_dense_models_have_none(kind: str) -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](num_hidden_layers=2))
    assert routers(model) == {}
    assert described({}) == "dense: no experts"


def test_experts_in_the_config_and_none_in_the_model_is_an_error() -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config("deepseek_v3", first_k_dense_replace=3))
    with pytest.raises(ConfigError, match=r"num_local_experts: no block of .* has experts with a router. Found 8"):
        routers(model)


def test_a_router_that_does_not_answer_is_an_error() -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    settings = CONFIG_MAPPING["llama4_text"](hidden_size=32, num_hidden_layers=2, num_local_experts=4, vocab_size=WORDS)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    with pytest.raises(ConfigError, match=r"Llama4TextMoe: router \(Llama4Router\) does not return"):
        routers(model)


class Gate(nn.Module):
    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, experts)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores = self.project(hidden)
        weights, chosen = scores.sigmoid().topk(2)
        return weights, chosen, scores


def test_experts_in_a_list_and_another_order_are_found() -> None:
    block = nn.Module()
    block.gate, block.experts = Gate(5, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
    router = routers(nn.ModuleDict({"mlp": block}))["mlp.gate"]
    assert (router.experts, router.chosen, router.scores_at, router.choice_at, router.sigmoid) == (5, 2, 2, 1, True)


def test_finding_changes_nothing() -> None:
    model = mixture("deepseek_v3")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    routers(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def outputs_of(model: nn.Module) -> dict[str, tuple[torch.Tensor, ...]]:
    """Record each router's outputs in one forward, by hooks."""
    seen: dict[str, tuple[torch.Tensor, ...]] = {}
    for name, router in routers(model).items():
        router.module.register_forward_hook(lambda _, __, output, name=name: seen.__setitem__(name, output))
    model(ids())
    return seen


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "olmoe", "qwen3_moe"])
@settings(max_examples=8, deadline=None)
@given(kept=st.floats(0.2, 1.0), seed=st.integers(0, 100))
def test_balance_is_that_of_transformers_for_each_layer(kind: str, kept: float, seed: int) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model = mixture(kind, seed=seed)
    found, seen = routers(model), outputs_of(model)
    mask = (torch.rand((4, 17), generator=torch.Generator().manual_seed(seed)) < kept).float()
    mask[0, 0] = 1
    theirs, ours = [], []
    for name, router in found.items():
        scores = seen[name][router.scores_at]
        theirs.append(load_balancing_loss_func((scores,), router.experts, router.chosen, mask))
        ours.append(measured(seen[name], router, mask.flatten()))
    torch.testing.assert_close(balance(ours), torch.stack(theirs).mean(), rtol=1e-5, atol=1e-6)
    both = load_balancing_loss_func(tuple(seen[name][0] for name in found), router.experts, router.chosen, mask)
    assert not torch.allclose(both, balance(ours), rtol=1e-4)  # transformers averages layers first


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_measured_is_what_a_loop_counts(kind: str) -> None:
    model = mixture(kind)
    found, seen = routers(model), outputs_of(model)
    mask = (torch.arange(68) % 3 > 0).float()
    for name, router in found.items():
        scores, _, choice = seen[name]
        sent, summed = measured(seen[name], router, mask)
        probability = scores.sigmoid() if router.sigmoid else scores.softmax(-1)
        expected, total = torch.zeros(router.experts), torch.zeros(router.experts)
        for token in range(68):
            if mask[token]:
                total += probability[token] / probability[token].sum()
                for expert in choice[token].tolist():
                    expected[expert] += 1
        torch.testing.assert_close(sent, expected)
        torch.testing.assert_close(summed, total)


@given(st.integers(2, 9), st.integers(1, 3), st.integers(0, 1000))
def test_balance_of_even_layers_is_experts_per_token(experts: int, chosen: int, seed: int) -> None:
    even = torch.stack([torch.full((experts,), 12.0 * chosen / experts), torch.full((experts,), 12.0 / experts)])
    torch.testing.assert_close(balance([even, even]), torch.tensor(float(chosen)))
    lopsided = torch.zeros(2, experts)
    lopsided[:, seed % experts] = torch.tensor([12.0 * chosen, 12.0])
    assert balance([lopsided]) > chosen


def test_balance_of_no_token_is_zero_with_a_zero_gradient() -> None:
    seen = torch.zeros(2, 4, requires_grad=True)
    balance([seen]).backward()
    assert balance([seen.detach()]).item() == 0
    assert torch.equal(seen.grad, torch.zeros(2, 4))


def test_a_nudge_lifts_the_idle_and_lowers_the_busy() -> None:
    router = next(iter(routers(mixture("ernie4_5_moe")).values()))
    update_balancing_bias(router, torch.tensor([9, 1, 5, 5]), 0.25)
    assert router.balancing_bias().flatten().tolist() == [-0.25, 0.25, 0, 0]
    update_balancing_bias(next(iter(routers(mixture("mixtral")).values())), torch.ones(4), 0.25)  # no balancing bias: no-op


@pytest.mark.parametrize(
    ("kind", "more", "expected"),
    [
        ("mixtral", {"router_aux_loss_coef": 0.03}, 0.03),
        ("deepseek_v3", {"aux_loss_alpha": 0.01}, 0.01 / 2),
        ("deepseek_v3", {}, 0.0),
    ],
)
def test_the_configs_coefficient_is_taken(kind: str, more: dict[str, float], expected: float) -> None:
    model = mixture(kind, **more)
    assert coefficient(model, routers(model)) == expected
