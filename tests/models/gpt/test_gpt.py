"""The native GPT against formulas of its papers."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptoughts.config.loader import ModelConfig
from gptoughts.models.gpt.attention import math_attention, rotary_tables, rotate
from gptoughts.models.gpt.gpt import GPT, KeyValueCache, full_cross_entropy

MakeModel = Callable[..., GPT]


def ids(*shape: int, rows: int = 96, seed: int = 0) -> Tensor:
    return torch.randint(rows, shape, generator=torch.Generator().manual_seed(seed))


def larger(model: GPT) -> GPT:
    """Scale weights by ten, so that errors show in the logits of a small model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model


# --- attention


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_math_attention_is_torchs(kv_heads: int, causal: bool) -> None:
    query, key, value = torch.randn(2, 4, 7, 8), torch.randn(2, kv_heads, 7, 8), torch.randn(2, kv_heads, 7, 8)
    repeated = [tensor.repeat_interleave(4 // kv_heads, dim=1) for tensor in (key, value)]
    expected = F.scaled_dot_product_attention(query, *repeated, is_causal=causal)
    torch.testing.assert_close(math_attention(query, key, value, causal), expected)


def test_fewer_queries_are_the_last_positions() -> None:
    query, key, value = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    whole = math_attention(query, key, value, True)
    torch.testing.assert_close(math_attention(query[:, :, -3:], key, value, True), whole[:, :, -3:])


def test_grouped_heads_are_repeated_heads(make_model: MakeModel) -> None:
    grouped, repeated = larger(make_model(kv_heads=2)), make_model(kv_heads=4)
    state = grouped.state_dict()
    for name in [name for name in state if name.endswith("qkv.weight")]:
        query, key, value = state[name].split([32, 16, 16])
        twice = [part.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32) for part in (key, value)]
        state[name] = torch.cat([query, *twice])
    repeated.load_state_dict(state)
    torch.testing.assert_close(grouped(ids(2, 16)), repeated(ids(2, 16)))


def test_attend_is_replaceable(make_model: MakeModel) -> None:
    model = make_model()
    seen = []

    def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        seen.append((tuple(query.shape), tuple(key.shape), causal))
        return math_attention(query, key, value, causal)

    before = model(ids(2, 16))
    for block in model.blocks:
        block.attention.attend = attend
    assert torch.equal(model(ids(2, 16)), before)
    assert seen == [((2, 4, 16, 8), (2, 4, 16, 8), True)] * 2


# --- causality and cache


def test_a_later_token_never_changes_an_earlier_logit(make_model: MakeModel, form: dict[str, Any]) -> None:
    model = larger(make_model(**form))
    tokens = ids(1, 16)
    before = model(tokens)
    for position in range(16):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % 96
        after = model(changed)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.allclose(after[:, position:], before[:, position:])


@pytest.mark.parametrize("steps", [[16], [5, 1, 1, 1, 8], [1] * 16], ids=str)
def test_cached_logits_are_the_uncached(make_model: MakeModel, form: dict[str, Any], steps: list[int]) -> None:
    model = larger(make_model(**form))
    tokens, cache = ids(3, 16), KeyValueCache(depth=2, length=16)
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in tokens.split(steps, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens))
    assert cache.used == 16


def test_too_long_a_sequence_is_named(make_model: MakeModel, form: dict[str, Any]) -> None:
    model, cache = make_model(**form), KeyValueCache(depth=2, length=16)
    with pytest.raises(ValueError, match=r"input_ids: at most sequence_length = 16 tokens. Found 17"):
        model(ids(1, 17))
    model(ids(1, 16), cache=cache)
    with pytest.raises(ValueError, match="Found 17"):
        model(ids(1, 1), cache=cache)


# --- positions


def test_rotation_keeps_only_the_distance() -> None:
    cos, sin = rotary_tables(64, 16, 10000.0, torch.device("cpu"))
    query, key = torch.randn(16), torch.randn(16)

    def score(at: int, other: int) -> Tensor:
        turned = [rotate(vector[None], cos[t : t + 1], sin[t : t + 1]) for vector, t in ((query, at), (key, other))]
        return (turned[0] * turned[1]).sum()

    for shift in (1, 7, 40):
        torch.testing.assert_close(score(12, 5), score(12 + shift, 5 + shift), atol=1e-4, rtol=1e-5)
    assert abs(score(12, 5) - score(12, 6)) > 1e-3
    torch.testing.assert_close(score(9, 9), query @ key)


def test_rotation_is_llamas() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = rotary_tables(8, 16, 10000.0, torch.device("cpu"))
    query, key = torch.randn(2, 3, 8, 16), torch.randn(2, 3, 8, 16)
    doubled = [torch.cat((table, table), dim=-1)[None] for table in (cos, sin)]
    expected = apply_rotary_pos_emb(query, key, *doubled)
    torch.testing.assert_close((rotate(query, cos, sin), rotate(key, cos, sin)), expected)


def test_rotation_is_over_positions_not_heads() -> None:
    cos, sin = rotary_tables(8, 16, 10000.0, torch.device("cpu"))
    turned = rotate(torch.ones(1, 8, 8, 16), cos, sin)  # as many heads as positions
    assert all(torch.equal(turned[:, head], turned[:, 0]) for head in range(8))
    assert not torch.allclose(turned[:, :, 1], turned[:, :, 0])


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_order_matters(make_model: MakeModel, positions: str) -> None:
    model = larger(make_model(positions=positions, depth=1))
    tokens = ids(1, 16)
    swapped = tokens[:, [1, 0, *range(2, 16)]]
    assert not torch.allclose(model(tokens)[:, -1], model(swapped)[:, -1], atol=1e-5)


def test_tables_are_exact_far_out() -> None:
    cos, _ = rotary_tables(100_001, 32, 10000.0, torch.device("cpu"))
    assert cos[100_000, 1].item() == pytest.approx(math.cos(100_000 * 10000.0 ** (-1 / 16)), abs=1e-6)


# --- loss


def test_loss_is_a_sum_over_labels_that_count(make_model: MakeModel, form: dict[str, Any]) -> None:
    model = larger(make_model(**form))
    tokens, labels = ids(2, 16), ids(2, 16, seed=1)
    labels[0, 3:9] = -100
    logits = model(tokens)
    expected = sum(
        -logits[row, at].log_softmax(-1)[labels[row, at]] for row in range(2) for at in range(16) if labels[row, at] >= 0
    )
    torch.testing.assert_close(model(tokens, labels), expected)
    assert model(tokens, torch.full_like(labels, -100)).item() == 0


def test_loss_is_replaceable_and_takes_any_integers(make_model: MakeModel) -> None:
    model = make_model()
    tokens, labels = ids(2, 16).to(torch.int32), ids(2, 16, seed=1).to(torch.int32)
    before = model(tokens, labels)
    model.head.loss = lambda hidden, weight, targets, reduction: 2 * full_cross_entropy(hidden, weight, targets, reduction)
    torch.testing.assert_close(model(tokens.to(torch.uint16), labels), 2 * before)


def test_fresh_weights_know_nothing(make_model: MakeModel, form: dict[str, Any]) -> None:
    loss = make_model(rows=256, width=64, **form)(ids(8, 16, rows=256), ids(8, 16, rows=256, seed=1)) / 128
    assert loss.item() == pytest.approx(torch.tensor(256.0).log().item(), abs=0.1)


# --- precision and dropout


def test_autocast_keeps_residual_and_loss_in_fp32(make_model: MakeModel, form: dict[str, Any]) -> None:
    model = larger(make_model(**form))
    tokens, seen = ids(2, 16), []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    exact = model(tokens, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, tokens)
        assert model(tokens).dtype == torch.bfloat16
    assert seen[1] == (torch.float32, torch.float32)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.03, atol=0)


def test_a_bf16_model_runs_and_stays_bf16(make_model: MakeModel, form: dict[str, Any]) -> None:
    model = make_model(**form).bfloat16()
    assert model(ids(2, 16)).dtype == torch.bfloat16
    assert model(ids(2, 16), ids(2, 16)).dtype == torch.float32


def test_dropout_acts_in_training_only(make_model: MakeModel) -> None:
    model = make_model(dropout=0.5)
    assert torch.equal(model(ids(1, 16)), model(ids(1, 16)))
    model.train()
    assert not torch.equal(model(ids(1, 16)), model(ids(1, 16)))
    assert not [module for module in make_model().modules() if isinstance(module, torch.nn.Dropout)]


def test_names_on_disk(make_model: MakeModel) -> None:
    block = ["norm1", "attention.qkv", "attention.out", "norm2", "mlp.down"]
    shared = ["embed", *[f"blocks.0.{name}" for name in block], "norm", "head"]
    modules = [*shared, "positions", "blocks.0.mlp.up"]
    gpt2 = make_model(depth=1, norm="layernorm", positions="learned", mlp="gelu", qk_norm=False, bias=True)
    without_bias = {"embed", "positions", "head"}
    names = {f"{name}.{kind}" for name in modules for kind in ("weight", "bias")} - {f"{n}.bias" for n in without_bias}
    assert set(gpt2.state_dict()) == names
    modern = [f"blocks.0.{name}" for name in ("attention.query_norm", "attention.key_norm", "mlp.gate_up")]
    assert set(make_model(depth=1).state_dict()) == {f"{name}.weight" for name in [*shared, *modern]}


def test_gradients_reach_every_parameter(make_model: MakeModel, form: dict[str, Any]) -> None:
    model = make_model(tied=False, **form)
    model(ids(2, 16), ids(2, 16, seed=1)).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


def test_config_with_swiglu_rounds_its_inner_width() -> None:
    mlp = GPT(ModelConfig(depth=1), 64, 8).blocks[0].mlp
    assert (mlp.gate_up.out_features, mlp.down.in_features) == (2 * 1024, 1024)


def test_swiglu_holds_the_gates_rows_first_then_ups(make_model: MakeModel) -> None:
    mlp, x = larger(make_model(depth=1)).blocks[0].mlp, torch.randn(3, 32)
    gate, up = mlp.gate_up.weight.split(mlp.down.in_features)
    torch.testing.assert_close(mlp(x), (F.silu(x @ gate.T) * (x @ up.T)) @ mlp.down.weight.T)
