"""The native GPT's modern form in the layouts of Llama (no QK-norm) and Qwen3 (QK-norm) of Hugging Face transformers.

What differs there: other names, queries, keys and values as three projections where the native model has one, gate and up of the
MLP as two. Values are moved, never changed.
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
    """What of `config` neither layout can hold; empty where one can."""
    differs = [
        f"{key} = {getattr(config, key)!r} (there: {value!r})" for key, value in FORM.items() if getattr(config, key) != value
    ]
    if config.bias and config.qk_norm:
        differs.append("bias = True with qk_norm = True (Qwen3 has no biases in its MLP)")
    return differs


def to_hf_config(config: ModelConfig, rows: int, sequence_length: int, eot_id: int | None = None) -> dict[str, Any]:
    """The content of config.json. Raises ConfigError, naming each difference, where neither layout can hold the model."""
    differs = problems(config)
    if differs:
        raise ConfigError("the layouts of Llama and Qwen3 cannot hold this model: " + ", ".join(differs))
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
    """Their tensors by their names, as views of `state` (native names)."""
    theirs: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in ENDS:
            if name != "head.weight" or not config.tied:
                theirs[ENDS[name]] = value
            continue
        block, _, inside = name.removeprefix("blocks.").partition(".")
        module, _, kind = inside.rpartition(".")
        for part, piece in zip(MODULES[module], _pieces(config, module, value), strict=True):
            theirs[f"model.layers.{block}.{part}.{kind}"] = piece
    return theirs


def _pieces(config: ModelConfig, module: str, value: Tensor) -> tuple[Tensor, ...]:
    if module == "attention.qkv":
        keys = config.key_value_heads * config.head_dim
        return value.split((config.heads * config.head_dim, keys, keys))
    return value.chunk(2) if module == "mlp.gate_up" else (value,)
