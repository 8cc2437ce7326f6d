"""Convert the native GPT's modern form to transformers' layouts of Llama (without QK-norm) and Qwen3 (with QK-norm).

In these layouts names differ, queries, keys and values are three projections instead of one, and gate and up of the MLP are two. Values are
not changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gptoughts.config.loader import ModelConfig
from gptoughts.errors import ConfigError
from gptoughts.models.gpt.gpt import NORM_EPSILON

FORM = {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu"}
MODULES = {
    "norm1": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.query_norm": ("self_attn.q_norm",),
    "attention.key_norm": ("self_attn.k_norm",),
    "attention.out": ("self_attn.o_proj",),
    "norm2": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
ENDS = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}


def problems(config: ModelConfig) -> list[str]:
    """Return the settings of `config` that neither layout supports."""
    differences = [
        f"{key} = {getattr(config, key)!r} (supported: {value!r})"
        for key, value in FORM.items()
        if getattr(config, key) != value
    ]
    if config.bias and config.qk_norm:
        differences.append("bias = True with qk_norm = True (Qwen3 has no biases in its MLP)")
    return differences


def to_hf_config(config: ModelConfig, rows: int, sequence_length: int, eot_id: int | None = None) -> dict[str, Any]:
    """Return the content of config.json. Raises ConfigError listing settings that neither layout supports."""
    differences = problems(config)
    if differences:
        raise ConfigError(f"model: not supported by the layouts of Llama and Qwen3: {', '.join(differences)}")
    kind, name = ("qwen3", "Qwen3ForCausalLM") if config.qk_norm else ("llama", "LlamaForCausalLM")
    return {
        "architectures": [name],
        "model_type": kind,
        "vocab_size": rows,
        "hidden_size": config.width,
        "intermediate_size": config.inner,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": sequence_length,
        "rms_norm_eps": NORM_EPSILON,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # for transformers below 5
        "attention_bias": config.bias,
        "tie_word_embeddings": config.tied,
        "attention_dropout": 0.0,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        **({"mlp_bias": config.bias} if kind == "llama" else {}),
    }


def to_hf_state(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return views of `state` (by native names) under transformers' names."""
    hf_state: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in ENDS:
            if name != "head.weight" or not config.tied:
                hf_state[ENDS[name]] = value
            continue
        block, _, inside = name.removeprefix("blocks.").partition(".")
        module, _, kind = inside.rpartition(".")
        for part, piece in zip(MODULES[module], _split(config, module, value), strict=True):
            hf_state[f"model.layers.{block}.{part}.{kind}"] = piece
    return hf_state


def _split(config: ModelConfig, module: str, value: Tensor) -> tuple[Tensor, ...]:
    if module == "attention.qkv":
        keys = config.key_value_heads * config.head_dim
        return value.split((config.heads * config.head_dim, keys, keys))
    return value.chunk(2) if module == "mlp.gate_up" else (value,)
