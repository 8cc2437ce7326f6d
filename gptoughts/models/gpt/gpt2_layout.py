"""Convert the native GPT-2 to and from config.json and model.safetensors of transformers' GPT2LMHeadModel.

In that layout names differ, projections are stored for x W (transformers' Conv1D) instead of nn.Linear's x W^T, and the tied head has no
tensor. Values are not changed, so a round trip is bit-identical.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoughts.config.loader import ModelConfig
from gptoughts.errors import CheckpointError, ConfigError
from gptoughts.models.gpt.gpt import GPT, NORM_EPSILON
from gptoughts.models.meta import on_meta
from gptoughts.models.weight_files import read_json, weight_files

TIED_HEAD = "head.weight"

# native module -> GPT-2 name, and whether its weight is stored transposed
ENDS = {"embed": ("wte", False), "positions": ("wpe", False), "norm": ("ln_f", False)}
BLOCK = {
    "norm1": ("ln_1", False),
    "attention.qkv": ("attn.c_attn", True),  # query, key, value along the output, in both layouts
    "attention.out": ("attn.c_proj", True),
    "norm2": ("ln_2", False),
    "mlp.up": ("mlp.c_fc", True),
    "mlp.down": ("mlp.c_proj", True),
}
# supported values of config.json keys that would change the computation; the first is the default of transformers
FIXED = {
    "layer_norm_epsilon": (NORM_EPSILON,),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


# --- config


def require_gpt2_form(config: ModelConfig) -> None:
    """Raise ConfigError listing the differences if the GPT-2 layout does not support `config`."""
    form = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True, "tied": True, "qk_norm": False}
    differences = [f"{key} = {getattr(config, key)!r} (GPT-2: {value!r})" for key, value in form.items()
                   if getattr(config, key) != value]  # fmt: skip
    if config.key_value_heads != config.heads:
        differences.append(f"kv_heads = {config.key_value_heads} (GPT-2: equal to heads, {config.heads})")
    if differences:
        raise ConfigError(f"model: not supported by Hugging Face's GPT-2 layout: {', '.join(differences)}")


def to_hf_config(config: ModelConfig, rows: int, sequence_length: int, eot_id: int | None = None) -> dict[str, Any]:
    """Return the content of config.json. Attention dropout is 0, because the native model has none."""
    require_gpt2_form(config)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": rows,
        "n_positions": sequence_length,
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_inner": config.inner,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        **{key: allowed[0] for key, allowed in FIXED.items()},
    }


def from_hf_config(hf_config: Mapping[str, Any]) -> tuple[ModelConfig, int, int]:
    """Return (config, embedding rows, sequence length) of a config.json. Raises CheckpointError for settings that change the logits.

    Dropout is 0: it is a training option, not a property of weights.
    """
    if hf_config.get("model_type") != "gpt2":
        raise CheckpointError("config.json: model_type must be gpt2", found=repr(hf_config.get("model_type")))
    differences = [f"{key} = {hf_config[key]!r} (native: {allowed[0]!r})" for key, allowed in FIXED.items()
                   if hf_config.get(key, allowed[0]) not in allowed]  # fmt: skip
    if differences:
        raise CheckpointError(f"config.json: not supported by the native GPT-2: {', '.join(differences)}")
    missing = [key for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head") if key not in hf_config]
    if missing:
        raise CheckpointError(f"config.json: missing keys: {', '.join(missing)}")
    try:
        config = ModelConfig(
            depth=hf_config["n_layer"], width=hf_config["n_embd"], heads=hf_config["n_head"],
            hidden=hf_config.get("n_inner"), vocab_size=hf_config["vocab_size"],
            norm="layernorm", positions="learned", mlp="gelu", qk_norm=False, bias=True,
        )  # fmt: skip
        sequence_length = int(hf_config["n_positions"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"config.json: {error}") from error
    if config.hidden == 4 * config.width:  # the default, explicit or not
        config = config.model_copy(update={"hidden": None})
    return config, hf_config["vocab_size"], sequence_length


# --- names and tensors


def parameter_names(depth: int) -> dict[str, tuple[str, bool]]:
    """Return native name -> (GPT-2 name, transposed) for every parameter of a GPT-2 with `depth` blocks and a tied head."""
    modules = {native: (f"transformer.{hf_name}", transposed) for native, (hf_name, transposed) in ENDS.items()}
    for index in range(depth):
        for native, (hf_name, transposed) in BLOCK.items():
            modules[f"blocks.{index}.{native}"] = (f"transformer.h.{index}.{hf_name}", transposed)
    names = {}
    for native, (hf_name, transposed) in modules.items():
        names[f"{native}.weight"] = (f"{hf_name}.weight", transposed)
        if native not in ("embed", "positions"):
            names[f"{native}.bias"] = (f"{hf_name}.bias", False)
    return names


def to_hf_gpt2(
    config: ModelConfig, state: Mapping[str, Tensor], eot_id: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (content of config.json, tensors by GPT-2 names) of a native GPT-2 and its state by native names.

    `head.weight` is optional and must equal `embed.weight`. Raises CheckpointError listing missing and unused keys, and
    ConfigError listing differences of the model from GPT-2.
    """
    require_gpt2_form(config)
    names = parameter_names(config.depth)
    _require_keys("model", names, [name for name in state if name != TIED_HEAD])
    _require_tied("model", TIED_HEAD, state.get(TIED_HEAD), state["embed.weight"])
    hf_state = {hf_name: _oriented(state[native], transposed) for native, (hf_name, transposed) in names.items()}
    rows, length = state["embed.weight"].shape[0], state["positions.weight"].shape[0]
    return to_hf_config(config, rows, length, eot_id), hf_state


def from_hf_gpt2(hf_config: Mapping[str, Any], hf_state: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return (native config, state by native names) of a Hugging Face GPT-2. The tied head is included once, as `embed.weight`.

    Accepts names with and without the prefix `transformer.`, and ignores causal masks that old files store as buffers.
    Raises CheckpointError listing missing, unused and wrongly shaped keys.
    """
    config, rows, sequence_length = from_hf_config(hf_config)
    named = {_full_name(name): tensor for name, tensor in hf_state.items() if not _is_causal_mask(name)}
    names = parameter_names(config.depth)
    head = named.pop("lm_head.weight", None)
    _require_keys("weights", [hf_name for hf_name, _ in names.values()], list(named))
    _require_tied("weights", "lm_head.weight", head, named["transformer.wte.weight"])
    state = {native: _oriented(named[hf_name], transposed) for native, (hf_name, transposed) in names.items()}
    _require_shapes(config, rows, sequence_length, state)
    return config, state


def _oriented(tensor: Tensor, transposed: bool) -> Tensor:
    return tensor.detach().t().contiguous() if transposed else tensor.detach().contiguous()


def _full_name(name: str) -> str:
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def _is_causal_mask(name: str) -> bool:
    return name.endswith((".attn.bias", ".attn.masked_bias"))


def _require_keys(where: str, expected: Mapping[str, Any] | list[str], found: list[str]) -> None:
    missing = [name for name in expected if name not in set(found)]
    unused = [name for name in found if name not in set(expected)]
    if missing or unused:
        parts = [f"{word}: {', '.join(names)}" for word, names in (("missing", missing), ("unused", unused)) if names]
        raise CheckpointError(f"{where}: parameters differ from GPT-2's: {'; '.join(parts)}")


def _require_tied(where: str, name: str, head: Tensor | None, embedding: Tensor) -> None:
    if head is not None and not torch.equal(head, embedding):
        raise CheckpointError(f"{where}: {name} differs from the embedding, but the GPT-2 layout ties them")


def _require_shapes(config: ModelConfig, rows: int, sequence_length: int, state: Mapping[str, Tensor]) -> None:
    with on_meta():
        expected = GPT(config, rows, sequence_length).state_dict()
    wrong = [f"{name} has shape {tuple(tensor.shape)}, config.json requires {tuple(expected[name].shape)}"
             for name, tensor in state.items() if tensor.shape != expected[name].shape]  # fmt: skip
    if wrong:
        raise CheckpointError(f"weights: shapes differ from config.json: {'; '.join(wrong)}")


# --- folders


def save_hf(model: GPT, tokenizer_folder: Path | None, folder: Path, eot_id: int | None = None) -> None:
    """Write `folder` for transformers' `from_pretrained`: config, safetensors, tokenizer files.

    Reads the weights back and raises CheckpointError if they differ.
    """
    hf_config, hf_state = to_hf_gpt2(model.config, model.state_dict(), eot_id)
    hf_state = {name: tensor.cpu() for name, tensor in hf_state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer_folder is not None:
        for file in sorted(path for path in tokenizer_folder.iterdir() if path.is_file()):
            shutil.copy2(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")
    weights = folder / "model.safetensors"
    save_file(hf_state, weights, metadata={"format": "pt"})
    written = load_file(weights)
    if written.keys() != hf_state.keys() or not all(torch.equal(written[name], hf_state[name]) for name in written):
        raise CheckpointError(f"{weights}: read-back differs from the written values", fix="check free disk space")


def load_hf(folder: Path) -> tuple[ModelConfig, int, int, dict[str, Tensor]]:
    """Return (config, embedding rows, sequence length, state by native names) of a folder written by transformers.

    Reads model.safetensors, or the shards in model.safetensors.index.json; never a pickle.
    """
    hf_config = read_json(folder / "config.json")
    config, state = from_hf_gpt2(hf_config, _read_weights(folder))
    return config, state["embed.weight"].shape[0], state["positions.weight"].shape[0], state


def _read_weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            state.update(load_file(file))
        except Exception as error:  # safetensors raises its own type, OSError and ValueError
            raise CheckpointError(f"{file}: cannot be read: {error}") from error
    return state
