"""Values of config.json in which a constructor of transformers fails are one error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptoughts.config.recipe import ModelConfig
from gptoughts.errors import ConfigError
from gptoughts.models.hf.config import open_config, whole_model
from gptoughts.models.hf.family import hf_family


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden_act": "x"},
        {"pad_token_id": 10**9},
        {"num_key_value_heads": 0},
        {"head_dim": -1},
        {"rms_norm_eps": "x"},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "x"}},
        {"rope_parameters": {"rope_type": "x", "rope_theta": 1e4}},
    ],
)
def test_a_value_without_meaning_in_config_json_is_one_error(tmp_path: Path, changed: dict[str, object]) -> None:
    tiny = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    content = {**tiny, "num_key_value_heads": 4, "vocab_size": 64, "max_position_embeddings": 64, **changed}
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    model = ModelConfig(family="hf", config=str(tmp_path))
    for build in (hf_family, lambda model: whole_model(model, "causal", 64)):
        with pytest.raises(
            ConfigError, match=r"^model( .*: (transformers cannot build it|invalid config\.json)|\.config .*: head_dim must be)"
        ):
            build(model)


def test_a_long_model_type_is_cut(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x" * 10**6}), encoding="utf-8")
    with pytest.raises(ConfigError, match="model_type unknown") as refusal:
        open_config(ModelConfig(family="hf", config=str(tmp_path)))
    assert len(str(refusal.value)) < 1000
