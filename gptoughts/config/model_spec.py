"""Model spec of a recipe, without torch: sizes, exact parameter count, FLOPs per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoughts.config import hf_spec
from gptoughts.config.hf_attention import attention_needs
from gptoughts.config.loader import DataConfig, ModelConfig, Recipe
from gptoughts.errors import ConfigError
from gptoughts.files import load_json

VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class ModelSpec:
    """Model sizes for layers. An unknown field is None; layers must accept that.

    `vocab_size` is the number of embedding rows (padding included), `hidden` the inner width of the MLP,
    `embedding_parameters` counts token embedding and learned positions, `parameters` all weights, a tied one once.
    `active_parameters` is the count per token: below `parameters` for mixture of experts, else None or equal.
    """

    family: str | None = None
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    vocab_size: int | None = None
    sequence_length: int | None = None
    parameters: int | None = None
    embedding_parameters: int | None = None
    projections: str | None = None  # "linear" (nn.Linear) or "conv1d" (transformers' GPT-2)
    tied: bool | None = None
    norm: str | None = None
    mlp: str | None = None
    causal: bool | None = None
    active_parameters: int | None = None
    experts: int | None = None  # per layer
    experts_per_token: int | None = None
    max_positions: int | None = None  # maximum sequence length
    attention_width: int | None = None  # heads x head width, if not equal to width
    stored_bytes: int | None = None  # per weight of the checkpoint, by its config.json, if 2
    attention_window: float | None = (
        None  # keys per token, mean over layers, if sliding windows make them fewer than the sequence
    )
    head: str | None = None  # "linear" (logits = hidden x weight) or "own" (scaled, capped, ...)
    attention_needs: str | None = None  # what its attention does beyond a replaceable attention function


UNKNOWN = ModelSpec()  # a user's own nn.Module


def padded_vocab(size: int) -> int:
    """Round a vocabulary size up to a multiple of 64, so that the head's matmul fills tensor-core tiles."""
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def embedding_rows(model: ModelConfig, vocab_size: int | None) -> int | None:
    """Return the embedding rows: the recipe's, else the tokenizer's `vocab_size` padded, else None.

    Raises ConfigError if the recipe has fewer rows than the tokenizer has ids.
    """
    if model.vocab_size is None:
        return None if vocab_size is None else padded_vocab(vocab_size)
    if vocab_size is not None and model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size: smaller than the tokenizer's vocabulary of {vocab_size}",
            found=model.vocab_size,
            fix=f"leave model.vocab_size out ({padded_vocab(vocab_size)} rows)",
        )
    return model.vocab_size


def of(model: ModelConfig, sequence_length: int, vocab_size: int | None) -> ModelSpec:
    """Return the spec of a native model; `vocab_size` is the tokenizer's, None if not known yet."""
    rows = embedding_rows(model, vocab_size)
    embedding = None if rows is None else _embedding_parameters(model, rows, sequence_length)
    parameters = None
    if rows is not None and embedding is not None:
        head = 0 if model.tied else rows * model.width
        parameters = embedding + model.depth * _block_parameters(model) + _norm_parameters(model) + head
    return ModelSpec(
        family=model.family,
        depth=model.depth,
        width=model.width,
        heads=model.heads,
        kv_heads=model.key_value_heads,
        head_dim=model.head_dim,
        hidden=model.inner,
        vocab_size=rows,
        sequence_length=sequence_length,
        parameters=parameters,
        embedding_parameters=embedding,
        projections="linear",
        tied=model.tied,
        norm=model.norm,
        mlp=model.mlp,
        causal=model.family != "llada",
    )


def of_hf(model: ModelConfig, sequence_length: int) -> ModelSpec:
    """Return the spec of a Hugging Face model from its config.json. Raises ConfigError if that cannot be read."""
    rows, config = None if model.path else model.vocab_size, hf_spec.read_config(model)
    fields = hf_spec.fields_of(config, sequence_length, rows)
    window = _attention_window(config, fields["depth"], sequence_length)
    stored = str(config.get("dtype") or config.get("torch_dtype")) if model.path else ""
    return ModelSpec(
        **fields,
        attention_window=window,
        stored_bytes=2 if stored in ("bfloat16", "float16") else None,
        attention_needs=None if model.remote_code else attention_needs(config),
    )


def _attention_window(config: Mapping[str, Any], depth: int | None, sequence_length: int) -> float | None:
    """Return the keys that a token attends to, mean over layers, if sliding windows make them fewer than the sequence; else None.

    Keys of transformers: `layer_types` names the windowed layers; without it Qwen has `use_sliding_window` and `max_window_layers`, and
    every layer of the other models that name a `sliding_window` has it.
    """
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    if type(window) is not int or not 0 < window < sequence_length or not depth:
        return None
    if isinstance(kinds, list):
        windowed = kinds.count("sliding_attention")
    elif str(config.get("model_type")).startswith("qwen"):
        windowed = max(0, depth - (config.get("max_window_layers") or 28)) if config.get("use_sliding_window") else 0
    else:
        windowed = depth
    return (windowed * window + (depth - windowed) * sequence_length) / depth if windowed else None


def spec_for(recipe: Recipe) -> ModelSpec:
    """Return the model spec of a recipe; sizes that depend on a text not read yet are None."""
    model, data = recipe.model, recipe.data
    if model.family == "hf":
        return of_hf(model, data.sequence_length)
    if model.family in ("gpt", "llada"):
        return of(model, data.sequence_length, vocabulary_of(data))
    return ModelSpec(family=model.family, depth=model.depth, width=model.width, sequence_length=data.sequence_length)


def vocabulary_of(data: DataConfig) -> int | None:
    """Return the tokenizer's vocabulary size if it is known without reading the text, else None."""
    index = Path(data.path).expanduser() / "index.json"
    if index.is_file():
        try:
            size = load_json(index).get("vocab_size")
        except (OSError, ValueError, AttributeError):
            return None  # reported when the folder is opened
        return size if isinstance(size, int) else None
    return {"bytes": 257, "gpt2": 50257, "bpe": data.train_bpe}.get(data.tokenizer)


def flops_per_token(spec: ModelSpec) -> int | None:
    """Return the FLOPs per trained token, forward and backward: 6 N + 12 L C T; None if a size is unknown.

    N counts the weights of matmuls (`matmul_parameters`). The second term is the two attention matmuls over the full T x T square: the
    causal half is not subtracted, recomputation not added; a sliding window takes the place of T where it is shorter.
    Source: Chowdhery et al. 2022, PaLM, appendix B (https://arxiv.org/abs/2204.02311).
    """
    weights, attention = matmul_parameters(spec), attention_flops(spec)
    return None if weights is None or attention is None else 6 * weights + attention


def matmul_parameters(spec: ModelSpec) -> int | None:
    """Return the weights that a token is multiplied with: all active parameters without lookup tables; None if unknown.

    Learned positions never count (as in nanoGPT); a token embedding counts only if it is tied to the head, so that tied and untied
    models with equal work have equal FLOPs.
    """
    if spec.parameters is None or spec.embedding_parameters is None or spec.vocab_size is None or spec.width is None:
        return None
    shared_with_head = spec.vocab_size * spec.width if spec.tied else 0
    return (spec.active_parameters or spec.parameters) - spec.embedding_parameters + shared_with_head


def attention_flops(spec: ModelSpec) -> int | None:
    """Return the FLOPs per token of the two matmuls of attention, forward and backward; None if unknown."""
    if spec.depth is None or spec.width is None or spec.sequence_length is None:
        return None
    keys = min(spec.sequence_length, spec.attention_window or spec.sequence_length)
    return round(12 * spec.depth * (spec.attention_width or spec.width) * keys)


def _embedding_parameters(model: ModelConfig, rows: int, sequence_length: int) -> int:
    return model.width * (rows + (sequence_length if model.positions == "learned" else 0))


def _norm_parameters(model: ModelConfig) -> int:
    return model.width * (2 if model.norm == "layernorm" and model.bias else 1)


def _block_parameters(model: ModelConfig) -> int:
    width, inner = model.width, model.inner
    qkv = (model.heads + 2 * model.key_value_heads) * model.head_dim
    into_mlp = 2 * inner if model.mlp == "swiglu" else inner
    weights = width * (qkv + width + into_mlp + inner)
    biases = qkv + width + into_mlp + width if model.bias else 0
    qk_norm = 2 * model.head_dim if model.qk_norm else 0
    return weights + biases + qk_norm + 2 * _norm_parameters(model)
