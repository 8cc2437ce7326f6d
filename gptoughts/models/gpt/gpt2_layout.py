"""The Hugging Face GPT-2 layout, both ways: config.json and model.safetensors as transformers' GPT2LMHeadModel reads.

What differs there: other names, projections stored as in x W (transformers' Conv1D) where nn.Linear stores W for x W^T,
and no tensor for the tied head. Values are moved, never changed, so a round trip gives the same bits.
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
from gptoughts.models.json_file import read_json
from gptoughts.models.meta import on_meta

TIED_HEAD = "head.weight"

# native module -> theirs, and whether its weight is stored transposed
ENDS = {"embed": ("wte", False), "positions": ("wpe", False), "norm": ("ln_f", False)}
BLOCK = {
    "norm1": ("ln_1", False),
    "attention.qkv": ("attn.c_attn", True),  # query, key, value along the output, in both layouts
    "attention.out": ("attn.c_proj", True),
    "norm2": ("ln_2", False),
    "mlp.up": ("mlp.c_fc", True),
    "mlp.down": ("mlp.c_proj", True),
}
# config.json keys that must hold one of these for the native GPT-2 to compute the same; the first is the default there
FIXED = {
    "layer_norm_epsilon": (NORM_EPSILON,),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


# --- config


def require_gpt2_form(config: ModelConfig) -> None:
    """Raise ConfigError, naming each difference, unless `config` is a model that the GPT-2 layout can hold."""
    form = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "bias": True, "tied": True, "qk_norm": False}
    differs = [f"{key} = {getattr(config, key)!r} (GPT-2: {value!r})" for key, value in form.items()
               if getattr(config, key) != value]  # fmt: skip
    if config.key_value_heads != config.heads:
        differs.append(f"kv_heads = {config.key_value_heads} (GPT-2: as many as heads, {config.heads})")
    if differs:
        raise ConfigError("the Hugging Face GPT-2 layout cannot hold this model: " + ", ".join(differs))


def to_hf_config(config: ModelConfig, rows: int, sequence_length: int, eot_id: int | None = None) -> dict[str, Any]:
    """The content of config.json. Attention dropout, which the native model does not have, is written as 0."""
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
    """(config, embedding rows, sequence length) of a config.json. A setting that would change the logits is refused.

    Dropout comes back as 0: it is a choice of each training, not a property of weights.
    """
    if hf_config.get("model_type") != "gpt2":
        raise CheckpointError(f"config.json: model_type is {hf_config.get('model_type')!r}, not 'gpt2'")
    differs = [f"{key} = {hf_config[key]!r} (native: {allowed[0]!r})" for key, allowed in FIXED.items()
               if hf_config.get(key, allowed[0]) not in allowed]  # fmt: skip
    if differs:
        raise CheckpointError("config.json: the native GPT-2 would compute something else: " + ", ".join(differs))
    missing = [key for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head") if key not in hf_config]
    if missing:
        raise CheckpointError(f"config.json: {', '.join(missing)} missing")
    try:
        config = ModelConfig(
            depth=hf_config["n_layer"], width=hf_config["n_embd"], heads=hf_config["n_head"],
            hidden=hf_config.get("n_inner"), vocab_size=hf_config["vocab_size"],
            norm="layernorm", positions="learned", mlp="gelu", qk_norm=False, bias=True,
        )  # fmt: skip
        sequence_length = int(hf_config["n_positions"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"config.json: {error}") from error
    if config.hidden == 4 * config.width:  # written out or not, it is the default
        config = config.model_copy(update={"hidden": None})
    return config, hf_config["vocab_size"], sequence_length


# --- names and tensors


def parameter_names(depth: int) -> dict[str, tuple[str, bool]]:
    """Native name -> (their name, transposed) for every parameter of a GPT-2 with `depth` blocks and a tied head."""
    modules = {native: (f"transformer.{theirs}", turned) for native, (theirs, turned) in ENDS.items()}
    for index in range(depth):
        for native, (theirs, turned) in BLOCK.items():
            modules[f"blocks.{index}.{native}"] = (f"transformer.h.{index}.{theirs}", turned)
    names = {}
    for native, (theirs, turned) in modules.items():
        names[f"{native}.weight"] = (f"{theirs}.weight", turned)
        if native not in ("embed", "positions"):
            names[f"{native}.bias"] = (f"{theirs}.bias", False)
    return names


def to_hf_gpt2(
    config: ModelConfig, state: Mapping[str, Tensor], eot_id: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json's content, their tensors) of a native GPT-2 and its state by native names.

    `head.weight` may be absent; present it must equal `embed.weight`. Raises CheckpointError naming every missing and
    unused key, ConfigError naming what makes the model another form than GPT-2.
    """
    require_gpt2_form(config)
    names = parameter_names(config.depth)
    _require_keys("the model", names, [name for name in state if name != TIED_HEAD])
    _require_tied("the model", TIED_HEAD, state.get(TIED_HEAD), state["embed.weight"])
    hf_state = {theirs: _turn(state[native], turned) for native, (theirs, turned) in names.items()}
    rows, length = state["embed.weight"].shape[0], state["positions.weight"].shape[0]
    return to_hf_config(config, rows, length, eot_id), hf_state


def from_hf_gpt2(hf_config: Mapping[str, Any], hf_state: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """(native config, state by native names) of a Hugging Face GPT-2. The tied head is in it once, as `embed.weight`.

    Takes names with and without the prefix `transformer.`, and passes over the causal masks that old files carry as
    buffers. Raises CheckpointError naming every missing, unused and misshapen key.
    """
    config, rows, sequence_length = from_hf_config(hf_config)
    named = {_full_name(name): tensor for name, tensor in hf_state.items() if not _is_causal_mask(name)}
    names = parameter_names(config.depth)
    head = named.pop("lm_head.weight", None)
    _require_keys("the file", [theirs for theirs, _ in names.values()], list(named))
    _require_tied("the file", "lm_head.weight", head, named["transformer.wte.weight"])
    state = {native: _turn(named[theirs], turned) for native, (theirs, turned) in names.items()}
    _require_shapes(config, rows, sequence_length, state)
    return config, state


def _turn(tensor: Tensor, turned: bool) -> Tensor:
    return tensor.detach().t().contiguous() if turned else tensor.detach().contiguous()


def _full_name(name: str) -> str:
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def _is_causal_mask(name: str) -> bool:
    return name.endswith((".attn.bias", ".attn.masked_bias"))


def _require_keys(where: str, expected: Mapping[str, Any] | list[str], found: list[str]) -> None:
    missing = [name for name in expected if name not in set(found)]
    unused = [name for name in found if name not in set(expected)]
    if missing or unused:
        parts = [f"{word}: {', '.join(names)}" for word, names in (("missing", missing), ("unused", unused)) if names]
        raise CheckpointError(f"the parameters of {where} are not those of GPT-2; " + "; ".join(parts))


def _require_tied(where: str, name: str, head: Tensor | None, embedding: Tensor) -> None:
    if head is not None and not torch.equal(head, embedding):
        raise CheckpointError(f"{where} has a {name} that is not its embedding, and the GPT-2 layout ties them")


def _require_shapes(config: ModelConfig, rows: int, sequence_length: int, state: Mapping[str, Tensor]) -> None:
    with on_meta():
        expected = GPT(config, rows, sequence_length).state_dict()
    wrong = [f"{name} is {tuple(tensor.shape)}, config.json makes it {tuple(expected[name].shape)}"
             for name, tensor in state.items() if tensor.shape != expected[name].shape]  # fmt: skip
    if wrong:
        raise CheckpointError("config.json and weights disagree: " + "; ".join(wrong))


# --- folders


def save_hf(model: GPT, tokenizer_folder: Path | None, folder: Path, eot_id: int | None = None) -> None:
    """Write `folder` as transformers' `from_pretrained` reads it: config, safetensors, the tokenizer's files.

    The weights are read back and compared before this returns; CheckpointError if the disk holds something else.
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
        raise CheckpointError(f"{weights} does not hold what was written; is the disk full?")


def load_hf(folder: Path) -> tuple[ModelConfig, int, int, dict[str, Tensor]]:
    """(config, embedding rows, sequence length, state by native names) of a folder that transformers wrote.

    Reads model.safetensors, or the shards that model.safetensors.index.json lists; never a pickle.
    """
    hf_config = read_json(folder / "config.json")
    config, state = from_hf_gpt2(hf_config, _read_weights(folder))
    return config, state["embed.weight"].shape[0], state["positions.weight"].shape[0], state


def _read_weights(folder: Path) -> dict[str, Tensor]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = [folder / Path(name).name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    else:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        why = f"{pickles[0]} is a pickle, which can run code; save it as safetensors" if pickles else "not found"
        raise CheckpointError(f"{single}: {why}")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state.update(load_file(file))
        except Exception as error:  # safetensors raises its own, OSError and ValueError
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    return state
