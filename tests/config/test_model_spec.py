"""The torch-free model spec equals the built model."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoughts.config import model_spec as facts
from gptoughts.config.loader import ModelConfig
from gptoughts.errors import ConfigError
from gptoughts.models.gpt.gpt import GPT


@st.composite
def configs(draw: Any) -> ModelConfig:
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 4]))
    return ModelConfig(
        depth=draw(st.integers(1, 3)),
        heads=heads,
        kv_heads=draw(st.sampled_from([None, kv_heads])),
        width=heads * draw(st.sampled_from([2, 4, 10])),
        hidden=draw(st.sampled_from([None, 7, 64])),
        norm=draw(st.sampled_from(["rmsnorm", "layernorm"])),
        positions=draw(st.sampled_from(["rope", "learned"])),
        mlp=draw(st.sampled_from(["swiglu", "gelu"])),
        qk_norm=draw(st.booleans()),
        tied=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


def built(config: ModelConfig, rows: int, sequence_length: int) -> GPT:
    with torch.device("meta"):
        return GPT(config, rows, sequence_length)


@settings(max_examples=150, deadline=None)
@given(configs(), st.integers(1, 300), st.integers(1, 40))
def test_parameters_are_exact(config: ModelConfig, vocab_size: int, sequence_length: int) -> None:
    known = facts.of(config, sequence_length, vocab_size)
    assert known.vocab_size is not None
    model = built(config, known.vocab_size, sequence_length)
    assert known.parameters == sum(parameter.numel() for parameter in model.parameters())
    looked_up = [model.embed] + ([model.positions] if model.positions is not None else [])
    assert known.embedding_parameters == sum(table.weight.numel() for table in looked_up)


@settings(max_examples=50, deadline=None)
@given(configs(), st.integers(1, 40))
def test_flops_follow_the_formula(config: ModelConfig, sequence_length: int) -> None:
    known = facts.of(config, sequence_length, 64)
    model = built(config, 64, sequence_length)
    in_blocks = sum(p.numel() for name, p in model.named_parameters() if name.startswith(("blocks.", "norm.")))
    multiplied = in_blocks + model.head.weight.numel()
    attention = 12 * config.depth * config.width * sequence_length
    assert facts.flops_per_token(known) == 6 * multiplied + attention


def test_gpt2_124m_has_the_published_size() -> None:
    config = ModelConfig(
        depth=12, width=768, heads=12, vocab_size=50257, norm="layernorm", positions="learned", mlp="gelu",
        qk_norm=False, bias=True,
    )  # fmt: skip
    known = facts.of(config, 1024, 50257)
    assert known.parameters == 124_439_808
    # nanoGPT's estimate_mfu: N without positions
    assert facts.flops_per_token(known) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 12 * 64 * 1024


def test_vocabulary_is_padded_to_64() -> None:
    assert [facts.padded_vocab(size) for size in (1, 64, 65, 50257)] == [64, 64, 128, 50304]
    assert facts.of(ModelConfig(), 8, 4096).vocab_size == 4096
    assert facts.of(ModelConfig(vocab_size=300), 8, 257).vocab_size == 300


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size: .* 257. Found 100"):
        facts.of(ModelConfig(vocab_size=100), 8, 257)


def test_what_is_not_known_is_none() -> None:
    known = facts.of(ModelConfig(), 8, None)
    assert (known.vocab_size, known.parameters, known.embedding_parameters) == (None, None, None)
    assert facts.flops_per_token(known) is None
    assert facts.flops_per_token(facts.UNKNOWN) is None
    assert set(vars(facts.UNKNOWN).values()) == {None}


def test_facts_need_no_torch() -> None:
    code = "import sys, gptoughts.config.model_spec; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
