"""Families: initial weights, ties, buffers and blocks, of the native GPT and of a user's own model."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn

from gptoughts.config.loader import ModelConfig
from gptoughts.errors import ConfigError
from gptoughts.models.family import FAMILIES, Initial, custom_family, draw, family_of, gpt_initial, initialize
from gptoughts.models.gpt.gpt import GPT, math_attention

GPT_FAMILY = FAMILIES["gpt"]
MakeModel = Callable[..., GPT]
HASH_OF_DRAW = """
import hashlib
from gptoughts.models.family import Initial, draw
values = draw(7, "blocks.0.mlp.up.weight", (300, 70), Initial("normal", 0.02))
print(hashlib.sha256(values.numpy().tobytes()).hexdigest())
"""


# --- initial weights


def test_draw_is_a_pure_function_of_seed_name_and_shape() -> None:
    normal = Initial("normal", 0.02)
    torch.manual_seed(1)
    first = draw(1, "embed.weight", (40, 8), normal)
    torch.manual_seed(2)
    draw(1, "another", (3,), normal)
    assert torch.equal(first, draw(1, "embed.weight", torch.Size([40, 8]), normal))
    with torch.device("meta"):
        assert torch.equal(first, draw(1, "embed.weight", (40, 8), normal))
    for other in (draw(2, "embed.weight", (40, 8), normal), draw(1, "head.weight", (40, 8), normal)):
        assert (first - other).abs().min() > 0
    assert first.dtype == torch.float32
    assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(2)).item()  # no draw was taken


@pytest.mark.parametrize("instructions", ["default", "avx2"])
def test_draw_is_the_same_on_other_instruction_sets(instructions: str) -> None:
    """torch's own fp32 normals differ with and without AVX2."""
    here = draw(7, "blocks.0.mlp.up.weight", (300, 70), Initial("normal", 0.02)).numpy().tobytes()
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": instructions}
    done = subprocess.run([sys.executable, "-c", HASH_OF_DRAW], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == hashlib.sha256(here).hexdigest()


def test_initial_weights_have_the_papers_spread(make_model: MakeModel) -> None:
    model = make_model(rows=512, sequence_length=64, depth=8, width=128, norm="layernorm", positions="learned", bias=True)
    residual = 0.02 / 16**0.5
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            std = residual if name.endswith(("attention.out.weight", "mlp.down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert parameter.mean().item() == pytest.approx(0, abs=std / 20), name


def test_every_parameter_of_the_family_has_an_initial_and_no_other() -> None:
    for words in ({}, {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True, "tied": False}):
        config = ModelConfig(depth=1, width=32, heads=4, **words)
        with torch.device("meta"):
            model = GPT_FAMILY.build(config, 64, 8)
        for name, parameter in model.named_parameters():
            assert gpt_initial(name, parameter.shape, config).kind in ("normal", "ones", "zeros")
    with pytest.raises(ConfigError, match=r"blocks\.0\.router\.weight"):
        gpt_initial("blocks.0.router.weight", (4, 4), config)


# --- meta, ties, buffers


def test_meta_then_materialize_then_retie_is_the_real_model(make_model: MakeModel, form: dict[str, Any]) -> None:
    real = make_model(**form)
    with torch.device("meta"):
        model = GPT_FAMILY.build(real.config, 96, 16)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model.head.weight is model.embed.weight
    model.to_empty(device="cpu")
    assert model.head.weight is not model.embed.weight  # to_empty unties them, so retie is needed
    initialize(model, GPT_FAMILY, real.config, seed=0)
    assert model.head.weight is model.embed.weight
    tokens = torch.arange(16)[None]
    assert torch.equal(model.eval()(tokens), real(tokens))
    assert dict(model.named_buffers()).keys() == dict(real.named_buffers()).keys()


def test_buffers_are_rebuilt_and_never_saved(make_model: MakeModel) -> None:
    model = make_model()
    cos = model.cos.clone()
    model.cos.zero_()
    GPT_FAMILY.buffers(model, torch.device("cpu"))
    assert torch.equal(model.cos, cos)
    assert not [name for name in model.state_dict() if "cos" in name or "sin" in name]


def test_ties_are_told_by_the_recipe(make_model: MakeModel) -> None:
    assert GPT_FAMILY.tied(make_model()) == [("head.weight", "embed.weight")]
    assert "head.weight" not in dict(make_model().named_parameters())
    untied = make_model(tied=False)
    assert GPT_FAMILY.tied(untied) == []
    GPT_FAMILY.retie(untied)
    assert untied.head.weight is not untied.embed.weight


# --- parts


def test_parts_have_names(make_model: MakeModel) -> None:
    model = make_model(depth=3)
    blocks = GPT_FAMILY.blocks(model)
    assert list(blocks) == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(model.get_submodule(name) is block for name, block in blocks.items())
    assert GPT_FAMILY.attentions is not None and GPT_FAMILY.head is not None
    assert list(GPT_FAMILY.attentions(model)) == [f"blocks.{index}.attention" for index in range(3)]
    assert GPT_FAMILY.head(model) is model.head


def test_set_attention_reaches_every_block_and_undoes(make_model: MakeModel) -> None:
    model = make_model(depth=3)
    calls = []

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(arguments[0].shape)
        return math_attention(*arguments)

    assert GPT_FAMILY.set_attention is not None
    undo = GPT_FAMILY.set_attention(model, counted)
    model(torch.arange(16)[None])
    assert len(calls) == 3
    undo()
    model(torch.arange(16)[None])
    assert len(calls) == 3
    assert all(block.attention.attend is math_attention for block in model.blocks)


def test_unknown_family_offers_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"model\.family: not one of gpt, llada.* \(did you mean 'gpt'\?\)\. Found 'gtp'"):
        family_of("gtp")
    with pytest.raises(TypeError, match=r"not a GPT. Found Linear"):
        GPT_FAMILY.blocks(nn.Linear(1, 1))


# --- a user's own model


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.short = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.mixed = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
        self.stack = nn.Module()
        self.stack.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight


def test_own_model_shows_its_blocks_and_ties() -> None:
    model = Own()
    family = custom_family(model)
    assert list(family.blocks(model)) == [f"stack.layers.{index}" for index in range(3)]
    assert family.tied(model) == [("head.weight", "embed.weight")]
    assert (family.attentions, family.set_attention, family.head, family.initial) == (None, None, None, None)
    model.head.weight = nn.Parameter(torch.zeros(9, 4))
    family.retie(model)
    assert model.head.weight is model.embed.weight
    assert family.build(ModelConfig(), 64, 8) is model
    with pytest.raises(ConfigError, match="custom family has no initialization; pass an initialized model"):
        initialize(model, family, ModelConfig(), 0)


def test_own_model_without_a_stack_has_no_blocks() -> None:
    assert custom_family(nn.Linear(2, 2)).blocks(nn.Linear(2, 2)) == {}
    assert list(custom_family(plain := nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))).blocks(plain)) == ["0", "1"]


def test_own_buffers_left_on_meta_are_named() -> None:
    model = nn.Module()
    model.register_buffer("table", torch.empty(2, device="meta"), persistent=False)
    with pytest.raises(ConfigError, match="table"):
        custom_family(model).buffers(model, torch.device("cpu"))
    custom_family(Own()).buffers(Own(), torch.device("cpu"))
