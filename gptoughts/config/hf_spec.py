"""Model spec of a Hugging Face model from its config.json, without torch: sizes, exact parameter counts (`hf_count.py`), limits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptoughts.config.hf_count import (
    ALIASES,
    DECODERS,
    ENCODERS,
    OFFSET_POSITIONS,
    POSITIVE,
    SCALED_LOGITS,
    SIZES,
    Config,
    count_of,
    get,
    mla_width,
)
from gptoughts.config.loader import shown
from gptoughts.config.model_path import check_sizes, resolve_model_folder
from gptoughts.config.recipe import ModelConfig
from gptoughts.errors import ConfigError, nearest
from gptoughts.files import load_json, owned, parse_json, read_limited

__all__ = [
    "check_length", "documents", "fields_of", "has_tokenizer", "kept_texts", "resolve_model_folder", "max_positions", "read_config",
    "rows", "tokenizer_folder",
]  # fmt: skip

SHIPPED = Path(__file__).parents[1] / "recipes" / "configs"
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
    for part in (content, content.get("text_config")):
        _check_types(part if isinstance(part, dict) else {}, what)
    return content


def _check_types(config: Config, what: str) -> None:
    """Raise ConfigError for a size that is not a whole number. Lists pass: some models have a size per layer."""
    for key in SIZES:
        for name in (key, *ALIASES.get(key, ())):
            value, least = config.get(name), 1 if key in POSITIVE else 0
            if value is not None and not isinstance(value, list) and (type(value) is not int or value < least):
                raise ConfigError(f"{what}: {name} must be a whole number of at least {least}", found=repr(value)[:100])
    if not isinstance(config.get("architectures"), list | None):
        raise ConfigError(f"{what}: architectures must be a list", found=repr(config["architectures"])[:100])


def has_tokenizer(model: ModelConfig) -> bool:
    """Return whether `model.path` has a tokenizer.json."""
    assert model.path is not None
    return (resolve_model_folder(model.path) / "tokenizer.json").is_file()


def tokenizer_folder(model: ModelConfig) -> Path:
    """Return the folder with the tokenizer.json of `model.path`. Raises ConfigError if there is none."""
    assert model.path is not None
    folder = resolve_model_folder(model.path)
    if not has_tokenizer(model):
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
    return held | kept_texts(folder, KEPT)


def kept_texts(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the texts of those of these files that `folder` has. Raises ConfigError for links that lead out of it and invalid JSON."""
    held = {}
    for name in names:
        path = folder / name
        if not path.exists():
            continue
        try:
            held[name] = read_limited(owned(path)).decode("utf-8")
            if path.suffix == ".json" and not isinstance(parse_json(held[name]), dict):
                raise ValueError("not a JSON object")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be kept with the weights ({str(error)[:200]})") from None
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
    most = get(_text(config), "max_position_embeddings")
    if isinstance(most, int) and config.get("model_type") in OFFSET_POSITIONS:
        padding = get(config, "pad_token_id")
        return max(1, most - (padding if type(padding) is int else 0) - 1)
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
    width, heads, depth = (get(c, key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    try:
        count = count_of(c)
        head_dim = mla_width(c) if "kv_lora_rank" in c else get(c, "head_dim")
    except (TypeError, KeyError, ZeroDivisionError):  # a key of the formula is missing or has a wrong type
        count = head_dim = None
    known = kind in DECODERS or kind in ENCODERS or kind == "gpt2"
    decoder = kind in DECODERS
    if not head_dim and "kv_lora_rank" not in c:
        head_dim = width // heads if width and heads else None
    norm, mlp = ("rmsnorm", "swiglu") if decoder else ("layernorm", "gelu")
    scaled = any(get(c, key) not in (None, 1, 1.0) for key in SCALED_LOGITS)
    return {
        "family": kind,
        "depth": depth,
        "width": width,
        "heads": heads,
        "kv_heads": get(c, "num_key_value_heads") or heads,
        "head_dim": head_dim,
        "hidden": get(c, "intermediate_size") or (4 * width if kind == "gpt2" and width else None),
        "vocab_size": get(c, "vocab_size"),
        "sequence_length": sequence_length,
        "parameters": count.all if count else None,
        "embedding_parameters": count.embedding if count else None,
        "projections": ("conv1d" if kind == "gpt2" else "linear") if known else None,
        "tied": bool(get(c, "tie_word_embeddings")) if kind not in ENCODERS else False,
        "norm": norm if known else None,
        "mlp": mlp if known else None,
        "causal": (kind not in ENCODERS) if known else None,
        "active_parameters": count.active if count else None,
        "experts": get(c, "num_experts"),
        "experts_per_token": get(c, "num_experts_per_tok") if get(c, "num_experts") else None,
        "max_positions": max_positions(config),
        "attention_width": count.attention_width if count else None,
        "head": "own" if scaled else ("linear" if known else None),
    }


def _text(config: Config) -> Config:
    """Return the language model's part of a config; multimodal models nest it."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) and "hidden_size" not in config else config
