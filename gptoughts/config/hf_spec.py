"""Model spec of a Hugging Face model from its config.json, without torch: sizes, exact parameter counts, limits.

Counts are formulas over the keys of config.json for the model types below, None for other types. Missing keys have the
defaults of transformers. `tests/config/test_hf_spec.py` compares each count with the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoughts.config.loader import shown
from gptoughts.config.model_path import check_sizes, resolve_model_folder
from gptoughts.config.recipe import ModelConfig
from gptoughts.errors import ConfigError, nearest
from gptoughts.files import load_json

__all__ = [
    "check_length", "documents", "fields_of", "resolve_model_folder", "max_positions", "read_config", "rows", "tokenizer_folder",
]  # fmt: skip

Config = Mapping[str, Any]

SHIPPED = Path(__file__).parents[1] / "recipes" / "configs"
ALIASES = {
    "hidden_size": ("n_embd", "dim", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner", "hidden_dim", "ffn_dim"),
    "max_position_embeddings": ("n_positions", "n_ctx", "max_sequence_length", "max_seq_len"),
    "num_experts": ("n_routed_experts", "num_local_experts"),
}
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

KEPT = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

# --- reading


def read_config(model: ModelConfig) -> dict[str, Any]:
    """Return the content of the config.json of `model.path` or `model.config`. Raises ConfigError."""
    if model.path is not None:
        return _read(resolve_model_folder(model.path) / "config.json", f"model.path {model.path}")
    if model.config is None:
        raise ConfigError("model: a Hugging Face model needs model.path (folder or hub name) or model.config (config.json)")
    return _read(_config_file(model.config), f"model.config {model.config}")


def _config_file(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir() or path.is_file():
        return path / "config.json" if path.is_dir() else path
    known = sorted(file.stem for file in SHIPPED.glob("*.json"))
    if name in known:
        return SHIPPED / f"{name}.json"
    text = f"model.config {name}: no such file, folder or shipped config{nearest(name, known)}"
    raise ConfigError(f"{text}; shipped: {', '.join(known)}")


def _read(path: Path, what: str) -> dict[str, Any]:
    try:
        content = load_json(path)
        check_sizes(content, what)
    except OSError as error:
        raise ConfigError(f"{what}: cannot read {shown(path)} ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{what}: {shown(path)} is not valid JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise ConfigError(f"{what}: {shown(path)} has no model_type")
    return content


def tokenizer_folder(model: ModelConfig) -> Path:
    """Return the folder with the tokenizer.json of `model.path`. Raises ConfigError if there is none."""
    assert model.path is not None
    folder = resolve_model_folder(model.path)
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"model.path {shown(folder)}: no tokenizer.json",
            fix=f'python -c "import transformers as t; t.AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"',
        )
    return folder


def documents(model: ModelConfig) -> dict[str, str]:
    """Return the text files of a checkpoint by name: config.json, and the tokenizer, generation and chat files of a folder."""
    held = {"config.json": json.dumps(read_config(model), indent=2) + "\n"}
    named = model.path or model.config
    folder = resolve_model_folder(model.path) if model.path else Path(named or "").expanduser()
    for name in KEPT:
        path = folder / name
        if path.is_file():
            held[name] = path.read_text(encoding="utf-8")
    return held


# --- limits


def rows(model: ModelConfig, words: int) -> int:
    """Return the embedding rows of a Hugging Face model for a tokenizer of `words` ids.

    `model.vocab_size` overrides them for random weights. Raises ConfigError if there are fewer rows than ids.
    """
    config = read_config(model)
    held = _text(config).get("vocab_size")
    if not isinstance(held, int):
        raise ConfigError(f"model {model.path or model.config}: config.json has no vocab_size")
    if model.vocab_size is not None and model.path is not None and model.vocab_size != held:
        raise ConfigError(f"model.vocab_size: pretrained embedding has {held} rows", found=model.vocab_size, fix="leave it out")
    found = model.vocab_size or held
    if words > found:
        raise ConfigError(
            f"data.tokenizer: {words} tokens, but the embedding of {model.path or model.config} has {found} rows",
            fix="leave data.tokenizer out to use the model's own" if model.path else f"--model.vocab-size {words}",
        )
    return found


def max_positions(config: Config) -> int | None:
    """Return the maximum sequence length of the model; None without a limit."""
    most = _get(_text(config), "max_position_embeddings")
    if isinstance(most, int) and config.get("model_type") in OFFSET_POSITIONS:
        return most - int(_get(config, "pad_token_id") or 0) - 1
    return most if isinstance(most, int) else None


def check_length(config: Config, sequence_length: int, named: str) -> None:
    """Raise ConfigError if `sequence_length` exceeds the positions of the model; `named` is the key that selected it."""
    most = max_positions(config)
    if most is not None and sequence_length > most:
        raise ConfigError(
            f"data.sequence_length: the model of {named} has positions for {most} tokens",
            found=sequence_length,
            fix=f"--data.sequence-length {most}",
        )


# --- model spec


def fields_of(config: Config, sequence_length: int, rows: int | None = None) -> dict[str, Any]:
    """Return the fields of `model_spec.ModelSpec` from config.json, None if unknown. `rows` replaces its vocab_size."""
    kind, c = config["model_type"], dict(_text(config), model_type=config["model_type"])
    if rows is not None:
        c["vocab_size"] = rows
    width, heads, depth = (_get(c, key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    try:
        count = _count(c)
    except (TypeError, KeyError, ZeroDivisionError):  # a key of the formula is missing or has a wrong type
        count = None
    known = kind in DECODERS or kind in ENCODERS or kind == "gpt2"
    decoder = kind in DECODERS
    head_dim = _get(c, "head_dim") or (width // heads if width and heads else None)
    norm, mlp = ("rmsnorm", "swiglu") if decoder else ("layernorm", "gelu")
    scaled = any(_get(c, key) not in (None, 1, 1.0) for key in SCALED_LOGITS)
    return {
        "family": kind,
        "depth": depth,
        "width": width,
        "heads": heads,
        "kv_heads": _get(c, "num_key_value_heads") or heads,
        "head_dim": _mla_width(c) if "kv_lora_rank" in c else head_dim,
        "hidden": _get(c, "intermediate_size") or (4 * width if kind == "gpt2" and width else None),
        "vocab_size": c.get("vocab_size"),
        "sequence_length": sequence_length,
        "parameters": count.all if count else None,
        "embedding_parameters": count.embedding if count else None,
        "projections": ("conv1d" if kind == "gpt2" else "linear") if known else None,
        "tied": bool(_get(c, "tie_word_embeddings")) if kind not in ENCODERS else False,
        "norm": norm if known else None,
        "mlp": mlp if known else None,
        "causal": (kind not in ENCODERS) if known else None,
        "active_parameters": count.active if count else None,
        "experts": _get(c, "num_experts"),
        "experts_per_token": _get(c, "num_experts_per_tok") if _get(c, "num_experts") else None,
        "max_positions": max_positions(config),
        "attention_width": count.attention_width if count else None,
        "head": "own" if scaled else ("linear" if known else None),
    }


@dataclass(frozen=True)
class _Count:
    """Parameter counts: all, active per token, embedding tables; and the attention width (heads x head width)."""

    all: int
    active: int
    embedding: int
    attention_width: int


def _text(config: Config) -> Config:
    """Return the language model's part of a config; multimodal models nest it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) and "hidden_size" not in config else config


def _get(c: Config, key: str) -> Any:
    names = (key, *ALIASES.get(key, ()))
    value = next((c[name] for name in names if c.get(name) is not None), None)
    # A null value is a setting, not a missing key: q_lora_rank = null means no low rank.
    return DEFAULTS.get(c["model_type"], {}).get(key) if value is None and not any(name in c for name in names) else value


def _count(c: Config) -> _Count | None:
    kind = c["model_type"]
    if kind == "gpt2":
        return _gpt2(c)
    if kind in ENCODERS:
        return _encoder(c)
    return _decoder(c) if kind in DECODERS else None


def _gpt2(c: Config) -> _Count:
    width, depth = _get(c, "hidden_size"), _get(c, "num_hidden_layers")
    inner = _get(c, "intermediate_size") or 4 * width
    block = 4 * width * width + 4 * width + 2 * width * inner + inner + width + 4 * width
    embedding = (c["vocab_size"] + _get(c, "max_position_embeddings")) * width
    head = 0 if _get(c, "tie_word_embeddings") else c["vocab_size"] * width
    everything = embedding + depth * block + 2 * width + head
    return _Count(everything, everything, embedding, width)


def _encoder(c: Config) -> _Count:
    """Count an encoder with the question-answering head (two logits per token) and without a pooler."""
    width, depth, inner = _get(c, "hidden_size"), _get(c, "num_hidden_layers"), _get(c, "intermediate_size")
    types = 0 if c["model_type"] == "distilbert" else _get(c, "type_vocab_size")
    embedding = (c["vocab_size"] + _get(c, "max_position_embeddings") + types) * width
    block = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    everything = embedding + 2 * width + depth * block + 2 * width + 2
    return _Count(everything, everything, embedding, width)


def _decoder(c: Config) -> _Count:
    width, depth = _get(c, "hidden_size"), _get(c, "num_hidden_layers")
    embedding = c["vocab_size"] * width
    head = 0 if _get(c, "tie_word_embeddings") else embedding
    shared = _attention(c) + 2 * width
    everything = active = embedding + head + width
    for layer in range(depth):
        whole, met = _experts(c) if _is_sparse(c, layer) else (_mlp(c), _mlp(c))
        everything, active = everything + shared + whole, active + shared + met
    per_head = (_mla_width(c) + c["v_head_dim"]) // 2 if "kv_lora_rank" in c else _head_dim(c)
    return _Count(everything, active, embedding, _get(c, "num_attention_heads") * per_head)


def _head_dim(c: Config) -> int:
    return _get(c, "head_dim") or _get(c, "hidden_size") // _get(c, "num_attention_heads")


def _mla_width(c: Config) -> int:
    return c.get("qk_nope_head_dim", 128) + c.get("qk_rope_head_dim", 64)


def _attention(c: Config) -> int:
    kind, width, heads = c["model_type"], _get(c, "hidden_size"), _get(c, "num_attention_heads")
    if kind.startswith("deepseek"):
        return _latent_attention(c, width, heads)
    queries, keys = heads * _head_dim(c), (_get(c, "num_key_value_heads") or heads) * _head_dim(c)
    weights = width * (queries + 2 * keys) + queries * width
    everywhere = kind in ("llama", "qwen3", "qwen3_moe") and bool(_get(c, "attention_bias"))
    inside = everywhere or kind == "qwen2" or (kind == "qwen2_moe" and bool(_get(c, "qkv_bias")))
    biases = (queries + 2 * keys if inside else 0) + (width if everywhere else 0)
    return weights + biases + (2 * _head_dim(c) if kind.startswith("qwen3") else 0)


def _latent_attention(c: Config, width: int, heads: int) -> int:
    """Count multi-head latent attention (DeepSeek-V2, 2024): low-rank queries and keys, each with a norm."""
    rank, low, bias = c["kv_lora_rank"], _get(c, "q_lora_rank"), bool(_get(c, "attention_bias"))
    queries = heads * _mla_width(c)
    into = width * queries if low is None else width * low + low + low * queries + (low if bias else 0)
    latent = width * (rank + c["qk_rope_head_dim"]) + rank + (rank + c["qk_rope_head_dim"] if bias else 0)
    expanded = rank * heads * (c["qk_nope_head_dim"] + c["v_head_dim"])
    return into + latent + expanded + heads * c["v_head_dim"] * width + (width if bias else 0)


def _mlp(c: Config) -> int:
    width, inner = _get(c, "hidden_size"), _get(c, "intermediate_size")
    biased = c["model_type"] in ("llama", "deepseek_v2") and bool(_get(c, "mlp_bias"))
    return 3 * width * inner + (2 * inner + width if biased else 0)


def _is_sparse(c: Config, layer: int) -> bool:
    kind = c["model_type"]
    if kind.startswith("deepseek"):
        return layer >= (_get(c, "first_k_dense_replace") or 0)
    if kind in ("qwen2_moe", "qwen3_moe"):
        return layer not in (c.get("mlp_only_layers") or []) and (layer + 1) % c.get("decoder_sparse_step", 1) == 0
    return kind == "mixtral"


def _experts(c: Config) -> tuple[int, int]:
    """Return (all, active per token) parameters of one expert layer, including router and shared experts."""
    kind, width = c["model_type"], _get(c, "hidden_size")
    inner = _get(c, "intermediate_size") if kind == "mixtral" else c["moe_intermediate_size"]
    one, count, chosen = 3 * width * inner, _get(c, "num_experts"), _get(c, "num_experts_per_tok")
    always = count * width  # the router
    if kind.startswith("deepseek"):
        shared = c.get("n_shared_experts", 2 if kind == "deepseek_v2" else 1)
        always += shared * one + (2 * inner * shared + width if kind == "deepseek_v2" and _get(c, "mlp_bias") else 0)
    if kind == "qwen2_moe":
        always += 3 * width * c["shared_expert_intermediate_size"] + width
    return always + count * one, always + chosen * one
