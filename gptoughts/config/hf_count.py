"""Count the parameters of Hugging Face models from config.json: formulas over its keys, None for other model types. Imports no torch.

Missing keys have the defaults of transformers. `tests/config/test_hf_spec.py` compares each count with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
ALIASES = {
    "hidden_size": ("n_embd", "dim", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner", "hidden_dim", "ffn_dim"),
    "max_position_embeddings": ("n_positions", "n_ctx", "max_sequence_length", "max_seq_len"),
    "num_experts": ("n_routed_experts", "num_local_experts"),
}
POSITIVE = {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"}
SIZES = POSITIVE | {
    "intermediate_size", "max_position_embeddings", "num_experts", "num_experts_per_tok", "num_key_value_heads", "head_dim", "kv_lora_rank",
    "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_intermediate_size", "n_shared_experts",
    "shared_expert_intermediate_size", "first_k_dense_replace", "type_vocab_size", "decoder_sparse_step", "max_window_layers",
}  # fmt: skip
"""Keys of config.json that are counts, if a model has them."""
DECODERS = (
    "llama", "mistral", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3", "mixtral", "qwen2_moe", "qwen3_moe",
)  # fmt: skip
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert")
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet")
"""Model types whose position ids start after the padding id."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8},
    "mixtral": {"num_key_value_heads": 8, "num_experts": 8, "num_experts_per_tok": 2},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "qwen2_moe": {"num_key_value_heads": 16, "qkv_bias": True},
    "qwen3_moe": {"num_key_value_heads": 4},
    "gpt2": {"tie_word_embeddings": True},
    "deepseek_v2": {"q_lora_rank": 1536, "first_k_dense_replace": 0},
    "deepseek_v3": {"q_lora_rank": 1536, "first_k_dense_replace": 3},
    "bert": {"type_vocab_size": 2},
    "roberta": {"type_vocab_size": 2, "pad_token_id": 1},
    "xlm-roberta": {"type_vocab_size": 2, "pad_token_id": 1},
    "camembert": {"type_vocab_size": 2, "pad_token_id": 1},
}
SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale", "lm_head_multiplier")
"""Keys that scale or cap logits after the head."""


@dataclass(frozen=True)
class Count:
    """Parameter counts: all, active per token, embedding tables; and the attention width (heads x head width)."""

    all: int
    active: int
    embedding: int
    attention_width: int


def get(c: Config, key: str) -> Any:
    """Return the value of a key or of another name of it, the default of transformers if it is missing; None for a size per layer."""
    names = (key, *ALIASES.get(key, ()))
    value = next((c[name] for name in names if c.get(name) is not None), None)
    if key in SIZES and type(value) is not int:
        value = None  # a size per layer
    # A null value is a setting, not a missing key: q_lora_rank = null means no low rank.
    return DEFAULTS.get(c["model_type"], {}).get(key) if value is None and not any(name in c for name in names) else value


def count_of(c: Config) -> Count | None:
    """Return the counts of a model type with a formula, else None. Raises KeyError, TypeError, ZeroDivisionError for missing keys."""
    kind = c["model_type"]
    if kind == "gpt2":
        return _gpt2(c)
    if kind in ENCODERS:
        return _encoder(c)
    return _decoder(c) if kind in DECODERS else None


def _gpt2(c: Config) -> Count:
    width, depth = get(c, "hidden_size"), get(c, "num_hidden_layers")
    inner = get(c, "intermediate_size") or 4 * width
    block = 4 * width * width + 4 * width + 2 * width * inner + inner + width + 4 * width
    embedding = (c["vocab_size"] + get(c, "max_position_embeddings")) * width
    head = 0 if get(c, "tie_word_embeddings") else c["vocab_size"] * width
    everything = embedding + depth * block + 2 * width + head
    return Count(everything, everything, embedding, width)


def _encoder(c: Config) -> Count:
    """Count an encoder with the question-answering head (two logits per token) and without a pooler."""
    width, depth, inner = get(c, "hidden_size"), get(c, "num_hidden_layers"), get(c, "intermediate_size")
    types = 0 if c["model_type"] == "distilbert" else get(c, "type_vocab_size")
    embedding = (c["vocab_size"] + get(c, "max_position_embeddings") + types) * width
    block = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    everything = embedding + 2 * width + depth * block + 2 * width + 2
    return Count(everything, everything, embedding, width)


def _decoder(c: Config) -> Count:
    width, depth = get(c, "hidden_size"), get(c, "num_hidden_layers")
    embedding = c["vocab_size"] * width
    head = 0 if get(c, "tie_word_embeddings") else embedding
    shared = _attention(c) + 2 * width
    everything = active = embedding + head + width
    for layer in range(depth):
        whole, met = _experts(c) if _is_sparse(c, layer) else (_mlp(c), _mlp(c))
        everything, active = everything + shared + whole, active + shared + met
    per_head = (mla_width(c) + c["v_head_dim"]) // 2 if "kv_lora_rank" in c else _head_dim(c)
    return Count(everything, active, embedding, get(c, "num_attention_heads") * per_head)


def _head_dim(c: Config) -> int:
    return get(c, "head_dim") or get(c, "hidden_size") // get(c, "num_attention_heads")


def mla_width(c: Config) -> int:
    """Return the width of a query head of multi-head latent attention."""
    return c.get("qk_nope_head_dim", 128) + c.get("qk_rope_head_dim", 64)


def _attention(c: Config) -> int:
    kind, width, heads = c["model_type"], get(c, "hidden_size"), get(c, "num_attention_heads")
    if kind.startswith("deepseek"):
        return _latent_attention(c, width, heads)
    queries, keys = heads * _head_dim(c), (get(c, "num_key_value_heads") or heads) * _head_dim(c)
    weights = width * (queries + 2 * keys) + queries * width
    everywhere = kind in ("llama", "qwen3", "qwen3_moe") and bool(get(c, "attention_bias"))
    inside = everywhere or kind == "qwen2" or (kind == "qwen2_moe" and bool(get(c, "qkv_bias")))
    biases = (queries + 2 * keys if inside else 0) + (width if everywhere else 0)
    return weights + biases + (2 * _head_dim(c) if kind.startswith("qwen3") else 0)


def _latent_attention(c: Config, width: int, heads: int) -> int:
    """Count multi-head latent attention (DeepSeek-V2, 2024): low-rank queries and keys, each with a norm."""
    rank, low, bias = c["kv_lora_rank"], get(c, "q_lora_rank"), bool(get(c, "attention_bias"))
    queries = heads * mla_width(c)
    into = width * queries if low is None else width * low + low + low * queries + (low if bias else 0)
    latent = width * (rank + c["qk_rope_head_dim"]) + rank + (rank + c["qk_rope_head_dim"] if bias else 0)
    expanded = rank * heads * (c["qk_nope_head_dim"] + c["v_head_dim"])
    return into + latent + expanded + heads * c["v_head_dim"] * width + (width if bias else 0)


def _mlp(c: Config) -> int:
    width, inner = get(c, "hidden_size"), get(c, "intermediate_size")
    biased = c["model_type"] in ("llama", "deepseek_v2") and bool(get(c, "mlp_bias"))
    return 3 * width * inner + (2 * inner + width if biased else 0)


def _is_sparse(c: Config, layer: int) -> bool:
    kind = c["model_type"]
    if kind.startswith("deepseek"):
        return layer >= (get(c, "first_k_dense_replace") or 0)
    if kind in ("qwen2_moe", "qwen3_moe"):
        return layer not in (c.get("mlp_only_layers") or []) and (layer + 1) % c.get("decoder_sparse_step", 1) == 0
    return kind == "mixtral"


def _experts(c: Config) -> tuple[int, int]:
    """Return (all, active per token) parameters of one expert layer, including router and shared experts."""
    kind, width = c["model_type"], get(c, "hidden_size")
    inner = get(c, "intermediate_size") if kind == "mixtral" else c["moe_intermediate_size"]
    one, count, chosen = 3 * width * inner, get(c, "num_experts"), get(c, "num_experts_per_tok")
    always = count * width  # the router
    if kind.startswith("deepseek"):
        shared = c.get("n_shared_experts", 2 if kind == "deepseek_v2" else 1)
        always += shared * one + (2 * inner * shared + width if kind == "deepseek_v2" and get(c, "mlp_bias") else 0)
    if kind == "qwen2_moe":
        always += 3 * width * c["shared_expert_intermediate_size"] + width
    return always + count * one, always + chosen * one
