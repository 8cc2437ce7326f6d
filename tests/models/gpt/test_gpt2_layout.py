"""The Hugging Face GPT-2 layout, checked against transformers' own GPT-2, in both directions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoughts.config.loader import ModelConfig
from gptoughts.errors import CheckpointError, ConfigError
from gptoughts.models.family import family_of, initialize
from gptoughts.models.gpt.gpt import GPT
from gptoughts.models.gpt.gpt2_layout import from_hf_config, from_hf_gpt2, load_hf, save_hf, to_hf_gpt2

GPT2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "qk_norm": False, "bias": True}
MakeModel = Callable[..., GPT]


@pytest.fixture
def gpt2(make_model: MakeModel) -> GPT:
    return random_weights(make_model(vocab_size=96, **GPT2))


def random_weights(model: GPT) -> GPT:
    """Give every weight a generic value, so that a missing bias or norm shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def native(config: ModelConfig, rows: int, sequence_length: int, state: dict[str, Tensor]) -> GPT:
    with torch.device("meta"):
        model = GPT(config, rows, sequence_length)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert (missing, unexpected) == (["head.weight"], [])
    model.tie()
    return model.eval()


def transformers_gpt2(**words: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    defaults = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 16, "vocab_size": 96}
    config = GPT2Config(**{**defaults, "bos_token_id": None, "eos_token_id": None, **words})
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def tokens(rows: int = 96, length: int = 16) -> Tensor:
    return torch.randint(rows, (2, length), generator=torch.Generator().manual_seed(3))


def assert_same_logits(ours: GPT, theirs: Any, input_ids: Tensor) -> None:
    with torch.no_grad():
        expected = theirs(input_ids).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(input_ids), expected, atol=1e-4, rtol=0)


# --- the same logits


def test_ours_read_by_transformers(gpt2: GPT, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    save_hf(gpt2, None, tmp_path)
    theirs, report = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_same_logits(gpt2, theirs.eval(), tokens())


@pytest.mark.parametrize("inner", [None, 56])
def test_theirs_read_by_us(inner: int | None, tmp_path: Path) -> None:
    theirs = transformers_gpt2(n_inner=inner)
    theirs.save_pretrained(tmp_path)
    config, rows, sequence_length, state = load_hf(tmp_path)
    assert (config.inner, rows, sequence_length) == (inner or 128, 96, 16)
    assert_same_logits(native(config, rows, sequence_length, state), theirs, tokens())


def test_gpt2_124m_shape_both_ways(tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    config = ModelConfig(depth=2, width=768, heads=12, vocab_size=50257, **GPT2)
    model = GPT(config, 50257, 1024)
    initialize(model, family_of("gpt"), config, 1337)
    save_hf(random_weights(model.eval()), None, tmp_path, eot_id=50256)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    input_ids = tokens(50257, 24)
    assert theirs.config.eos_token_id == 50256
    assert_same_logits(model, theirs, input_ids)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_hf(tmp_path / "theirs")
    assert loaded[0] == config
    assert_same_logits(native(*loaded), theirs, input_ids)


# --- round trips


def test_round_trip_gives_the_same_bits(gpt2: GPT, tmp_path: Path) -> None:
    hf_config, hf_state = to_hf_gpt2(gpt2.config, gpt2.state_dict())
    config, state = from_hf_gpt2(hf_config, hf_state)
    own = dict(gpt2.named_parameters())
    assert config == gpt2.config
    assert state.keys() == own.keys()
    assert all(torch.equal(state[name], own[name]) for name in own)
    save_hf(gpt2, None, tmp_path)
    config, rows, sequence_length, state = load_hf(tmp_path)
    assert (config, rows, sequence_length) == (gpt2.config, 96, 16)
    assert all(torch.equal(state[name], own[name]) for name in own)


def test_their_files_come_back_bit_equal(tmp_path: Path) -> None:
    transformers_gpt2().save_pretrained(tmp_path)
    config, _, _, state = load_hf(tmp_path)
    _, hf_state = to_hf_gpt2(config, state)
    original = load_file(tmp_path / "model.safetensors")
    assert hf_state.keys() == original.keys() - {"lm_head.weight"}
    assert all(torch.equal(hf_state[name], original[name]) for name in hf_state)


def test_old_files_without_prefix_and_with_masks(gpt2: GPT) -> None:
    hf_config, hf_state = to_hf_gpt2(gpt2.config, gpt2.state_dict())
    old = {name.removeprefix("transformer."): tensor for name, tensor in hf_state.items()}
    old |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    _, state = from_hf_gpt2(hf_config, old)
    assert torch.equal(state["blocks.1.mlp.up.weight"], gpt2.blocks[1].mlp.up.weight)


def test_shards_and_tokenizer_files(gpt2: GPT, tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    folder = tmp_path / "hf"
    save_hf(gpt2, tmp_path / "tokenizer", folder)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    whole = load_file(folder / "model.safetensors")
    shards = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(whole)}
    for shard in set(shards.values()):
        save_file({name: tensor for name, tensor in whole.items() if shards[name] == shard}, folder / shard)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert load_hf(folder)[3].keys() == dict(gpt2.named_parameters()).keys()


# --- refusals


def test_the_modern_form_is_refused_with_what_differs(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        save_hf(make_model(kv_heads=2, tied=False), None, tmp_path / "hf")
    for word in ("norm = 'rmsnorm'", "positions = 'rope'", "mlp = 'swiglu'", "bias", "tied", "qk_norm", "kv_heads = 2"):
        assert word in str(refused.value)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "relu"),
        ("scale_attn_by_inverse_layer_idx", True),
        ("layer_norm_epsilon", 1e-6),
        ("tie_word_embeddings", False),
        ("model_type", "llama"),
        ("n_embd", 33),
        ("n_head", "many"),
    ],
)
def test_a_config_that_computes_something_else_is_refused(gpt2: GPT, key: str, value: Any) -> None:
    hf_config, _ = to_hf_gpt2(gpt2.config, gpt2.state_dict())
    with pytest.raises(CheckpointError, match=r"config\.json"):
        from_hf_config({**hf_config, key: value})


def test_a_config_without_sizes_is_refused() -> None:
    with pytest.raises(CheckpointError, match="missing keys: n_embd, n_layer, n_head"):
        from_hf_config({"model_type": "gpt2", "vocab_size": 8, "n_positions": 8})


def test_missing_unused_and_misshapen_keys_are_named(gpt2: GPT) -> None:
    hf_config, hf_state = to_hf_gpt2(gpt2.config, gpt2.state_dict())
    wrong = dict(hf_state)
    wrong["transformer.h.0.attn.lora"] = wrong.pop("transformer.h.1.mlp.c_fc.bias")
    with pytest.raises(CheckpointError, match=r"missing: .*h\.1\.mlp\.c_fc\.bias; unused: .*h\.0\.attn\.lora"):
        from_hf_gpt2(hf_config, wrong)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mlp\.up\.weight has shape \(32, 128\)"):
        weight = "transformer.h.0.mlp.c_fc.weight"
        from_hf_gpt2(hf_config, {**hf_state, weight: hf_state[weight].t()})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding"):
        from_hf_gpt2(hf_config, {**hf_state, "lm_head.weight": torch.zeros(96, 32)})
    state = gpt2.state_dict()
    del state["norm.bias"]
    with pytest.raises(CheckpointError, match=r"missing: norm\.bias"):
        to_hf_gpt2(gpt2.config, state)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_a_pickle_is_refused_in_one_line(gpt2: GPT, tmp_path: Path, name: str) -> None:
    save_hf(gpt2, None, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name}: a pickle.*\n  Try: .*python -c .*save_file.*{name}") as refused:
        load_hf(tmp_path)
    assert str(refused.value).count("\n") == 1


def test_missing_and_damaged_files_are_named(gpt2: GPT, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        load_hf(tmp_path)
    save_hf(gpt2, None, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        load_hf(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not found"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"not a JSON object. Found list"):
        load_hf(tmp_path)


def test_a_disk_that_lies_is_found_out(gpt2: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gptoughts.models.gpt.gpt2_layout as layout

    monkeypatch.setattr(layout, "load_file", lambda path: {})
    with pytest.raises(CheckpointError, match="read-back differs from the written values"):
        save_hf(gpt2, None, tmp_path)
