"""Tiny configs of every causal model type of transformers, made from the defaults of its config class."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.families.exceptions import OWN
from gptoughts.models.hf import twin
from gptoughts.models.hf.config import DROPOUT_KEYS

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LEFT_OUT = ("transformers_version", "dtype")


def tiny(kind: str) -> dict[str, Any]:
    """Return the content of a config.json of a tiny `kind`, without dropout, as a decoder."""
    config = CONFIG_MAPPING[kind]()
    content = {key: value for key, value in twin.smaller(config.to_dict()).items() if key not in LEFT_OUT}
    if content.get("is_decoder") is False:
        content["is_decoder"] = True  # else it reads both ways, and is refused
    return {**_without_dropout(_merged(content, OWN.get(kind, {}))), "model_type": kind}


def _merged(content: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    out = dict(content)
    for key, value in more.items():
        out[key] = _merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def _without_dropout(content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    return {
        key: type(value)(0) if DROPOUT_KEYS.search(key) and type(value) in (int, float) else _without_dropout(value)
        for key, value in content.items()
    }


def config_of(content: dict[str, Any]) -> PretrainedConfig:
    """Return transformers' config of a config.json."""
    return CONFIG_MAPPING[content["model_type"]].from_dict(copy.deepcopy(content))
