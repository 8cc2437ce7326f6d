"""Convert the config.json of published LLaDA checkpoints to the sizes of the native model and back. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptoughts.config.recipe import ModelConfig
from gptoughts.errors import ConfigError

REQUIRED = {
    "alibi": (False,),
    "block_type": ("llama",),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "include_bias": (False,),
    "include_qkv_bias": (False,),
    "attention_layer_norm": (False,),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
    "block_group_size": (1,),
    "rms_norm_eps": (1e-5,),
    "multi_query_attention": (False, None),
    "layer_norm_with_affine": (True,),
    "bias_for_layer_norm": (False, None),
    "clip_qkv": (None,),
}
"""Architecture keys -> supported values. A missing key counts as supported."""
NEEDED = ("d_model", "n_heads", "n_layers")
COUNTS = ("n_kv_heads", "mlp_hidden_size", "embedding_size", "vocab_size")
NUMBERS = ("rope_theta", "mlp_ratio")


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the recipe's [model] table. Raises ConfigError listing every unsupported key."""
    wrong = [
        f"unsupported {key} = {config[key]!r} (supported: {' or '.join(map(repr, built))})"
        for key, built in REQUIRED.items()
        if key in config and config[key] not in built
    ]
    wrong += [f"missing {key}" for key in NEEDED if config.get(key) is None]
    wrong += [
        f"{key} = {config[key]!r:.100} (a whole number of at least 1)"
        for key in (*NEEDED, *COUNTS)
        if config.get(key) is not None and (type(config[key]) is not int or config[key] < 1)
    ]
    wrong += [f"{key} = {config[key]!r:.100} (a number)" for key in NUMBERS if type(config.get(key, 1)) not in (int, float)]
    if config.get("embedding_size") is None and config.get("vocab_size") is None:
        wrong.append("missing vocab_size")
    if wrong:
        raise ConfigError(f"config.json of a LLaDA model: {'; '.join(wrong)}")
    inner = config.get("mlp_hidden_size") or config.get("mlp_ratio", 4) * config["d_model"]
    return {
        "depth": config["n_layers"],
        "width": config["d_model"],
        "heads": config["n_heads"],
        "kv_heads": config.get("n_kv_heads") or config["n_heads"],
        "hidden": inner,
        "vocab_size": config.get("embedding_size") or config["vocab_size"],
        "norm": "rmsnorm",
        "positions": "rope",
        "mlp": "swiglu",
        "qk_norm": False,
        "tied": bool(config.get("weight_tying", False)),
        "bias": False,
        "rope_theta": float(config.get("rope_theta", 10000.0)),
    }


def published(model: ModelConfig, rows: int, sequence_length: int, mask_token_id: int, eos_token_id: int) -> dict[str, Any]:
    """Return the config.json in the published layout. Raises ConfigError if the model has parts that LLaDA lacks."""
    built = {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "qk_norm": False, "bias": False}
    wrong = [f"model.{key} = {getattr(model, key)!r}" for key, value in built.items() if getattr(model, key) != value]
    if wrong:
        raise ConfigError(f"model: not representable in LLaDA's published layout: {', '.join(wrong)}")
    return {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "d_model": model.width,
        "n_heads": model.heads,
        "n_kv_heads": model.key_value_heads,
        "n_layers": model.depth,
        "mlp_hidden_size": model.inner,
        "vocab_size": rows,
        "embedding_size": rows,
        "max_sequence_length": sequence_length,
        "rope_theta": model.rope_theta,
        "weight_tying": model.tied,
        "mask_token_id": mask_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": eos_token_id,
        "rms_norm_eps": 1e-5,
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "rope": True,
        "alibi": False,
        "include_bias": False,
        "include_qkv_bias": False,
    }
