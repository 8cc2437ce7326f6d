"""Pretrained weights of a Hugging Face folder as a source for `materialize`: safetensors only, and nothing skipped in silence."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from gptoughts.config.hf_spec import folder_of
from gptoughts.config.loader import shown
from gptoughts.config.recipe import ModelConfig
from gptoughts.errors import CheckpointError
from gptoughts.models.hf.config import Task, model_class, open_config, quiet
from gptoughts.models.sources import Source
from gptoughts.models.torch_internals import ignored_on_load

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
WIDTHS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Floating-point types of safetensors that a model computes in, widest first."""
LONGEST_HEADER = 100 * 2**20
NAMED = 8
"""Keys that a message names."""


class Pretrained:
    """The weights in a folder, in transformers' own names for this model, held once in their own precision.

    They are converted by transformers' own loader, which fuses experts and dequantizes block FP8. Each is let go once it was
    asked for. `drawn` gives what a new head begins with where the folder has none (question answering). `notes` are for the user.
    """

    def __init__(
        self, folder: Path, task: Task = "causal", drawn: Source | None = None, remote_code: str | None = None
    ) -> None:
        self.folder, self.notes = folder, list[str]()
        self._drawn = drawn
        refuse_pickles(folder)
        # A recipe's dropout is no matter here: weights have none.
        ours = ModelConfig(family="hf", path=remote_code or str(folder), remote_code=remote_code)
        config, _ = open_config(ours, task)
        model, found = self._load(config, task, ours)
        self._parts: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
        self._new = self._judge(model, found, task)
        for name in self._new:
            self._parts.pop(name, None)
        self._unused: list[str] = []

    def _load(self, config: PretrainedConfig, task: Task, ours: ModelConfig) -> tuple[PreTrainedModel, Mapping[str, Any]]:
        loader, words = model_class(task, ours)
        quantized = _quantization(self.folder)
        if quantized is not None:
            config.quantization_config = quantized
        with quiet():
            try:
                return loader.from_pretrained(
                    self.folder, config=config, dtype=_precision(self.folder), local_files_only=True, use_safetensors=True,
                    output_loading_info=True, attn_implementation="eager", ignore_mismatched_sizes=True, **words,
                )  # fmt: skip
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
                raise CheckpointError(f"{shown(self.folder)}: weights cannot be read: {said[:300]}") from error

    def _judge(self, model: PreTrainedModel, found: Mapping[str, Any], task: Task) -> set[str]:
        """Names that begin afresh; CheckpointError where anything else is missing, of another shape or not used."""
        missing, unexpected = set(found["missing_keys"]), sorted(found["unexpected_keys"])
        wrong = [
            f"{name} is {tuple(there)}, config.json makes it {tuple(here)}" for name, there, here in found["mismatched_keys"]
        ]
        new: set[str] = set()
        if task == "question-answering":
            new = {name for name in missing if not name.startswith(f"{model.base_model_prefix}.")}
            other = [name for name in unexpected if _of_another_task(name, model)]
            if other:
                self.notes.append(f"{shown(self.folder)}: heads of other tasks are left out: {_listed(other)}")
            unexpected = [name for name in unexpected if name not in other]
        problems = [
            f"{word}: {_listed(names)}"
            for word, names in (
                ("missing", sorted(missing - new)),
                ("of another shape", wrong),
                ("not of this model", unexpected),
            )
            if names
        ]
        problems += [
            f"cannot be converted: {line}" for line in [*found.get("error_msgs", []), *found.get("conversion_errors", {})]
        ]
        problems += _torn(model)
        if problems:
            raise CheckpointError(f"{shown(self.folder)}: weights do not fit {type(model).__name__}: " + "; ".join(problems))
        if new:
            self.notes.append(f"{shown(self.folder)}: no head for this task, a new one begins: {_listed(sorted(new))}")
        left_out = _left_out(self.folder, model)
        if left_out:
            self.notes.append(f"{shown(self.folder)}: transformers leaves out {_listed(left_out)}")
        return new

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """The pretrained value of the parameter `name`, or a new head's first one; None where there is neither."""
        if name in self._new:
            return self._drawn.tensor(name, shape) if self._drawn is not None else None
        held = self._parts.pop(name, None)
        return None if held is None else held.detach()

    def buffer(self, name: str) -> Tensor | None:
        """The value of a persistent buffer, such as a routing bias."""
        return self.tensor(name, torch.Size())

    def unused(self) -> list[str]:
        """Nothing: what the model does not have was refused when the folder was opened."""
        return self._unused


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _of_another_task(name: str, model: PreTrainedModel) -> bool:
    """A pooler, or a part that stands beside the encoder."""
    base = model.base_model
    first = name.removeprefix(f"{model.base_model_prefix}.").split(".")[0]
    return first not in dict(base.named_children())


def _torn(model: PreTrainedModel) -> list[str]:
    """Weights that config.json ties and that the files hold twice with different values."""
    mapping = model.get_expanded_tied_weights_keys(all_submodels=True)
    return [
        f"{alias} and {owner} differ, and config.json ties them; set tie_word_embeddings to false there"
        for alias, owner in mapping.items()
        if model.get_parameter(alias) is not model.get_parameter(owner)
    ]


# --- what lies in the folder


def files_of(folder: Path) -> list[Path]:
    """The safetensors of a model's weights. Raises CheckpointError where there are none, or one that the index names is missing."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CheckpointError(f"{shown(folder)}: no model.safetensors")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{shown(index)} cannot be read: {error}") from None
    missing = [name for name in names if not (folder / Path(name).name).is_file()]
    if missing:
        raise CheckpointError(f"{shown(folder)}: {', '.join(missing)} missing, which its index names")
    return [folder / Path(name).name for name in names]


def refuse_pickles(folder: Path) -> None:
    """Raise CheckpointError where the weights are pickles, which run code when they are read, with the command that converts them."""
    try:
        files_of(folder)
    except CheckpointError:
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if not pickles:
            raise
        raise CheckpointError(
            f"{shown(folder)}: {pickles[0]} is a pickle, which can run code; if you trust it, convert it once: "
            f'python -c "import transformers as t; m = t.AutoModelForCausalLM.from_pretrained({str(folder)!r}); '
            f'm.save_pretrained({str(folder)!r})"'
        ) from None


def _headers(folder: Path) -> dict[str, str]:
    """Tensor name -> type, from the head of each file: 8 bytes of length, then JSON."""
    types: dict[str, str] = {}
    for path in files_of(folder):
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                content = json.loads(file.read(min(length, LONGEST_HEADER)))
            types |= {name: entry["dtype"] for name, entry in content.items() if name != "__metadata__"}
        except (OSError, ValueError, struct.error, KeyError, TypeError) as error:
            raise CheckpointError(f"{shown(path)} is not safetensors: {error}") from None
    return types


def _precision(folder: Path) -> torch.dtype:
    """The widest type of the weights, so that none is rounded, whatever config.json says; bf16 for FP8, as DeepSeek's own conversion."""
    types = _headers(folder)
    held = {kind for name, kind in types.items() if not name.endswith("_scale_inv")}
    if any(kind.startswith("F8") for kind in held):
        return torch.bfloat16
    return next((width for kind, width in WIDTHS.items() if kind in held), torch.float32)


def _quantization(folder: Path) -> dict[str, Any] | None:
    """What config.json says of quantized weights, with the wish for full ones. Raises CheckpointError where they are no FP8."""
    try:
        asked = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{shown(folder / 'config.json')} cannot be read: {error}") from None
    if asked is None:
        return None
    method = asked.get("quant_method")
    if method != "fp8":
        raise CheckpointError(f"{shown(folder)}: weights are quantized by {method!r}, which cannot be trained; take full ones")
    return {**asked, "dequantize": True}


def _left_out(folder: Path, model: PreTrainedModel) -> list[str]:
    """Tensors that transformers' own list says are not of this model, such as DeepSeek-V3's layer for several tokens at once."""

    patterns = [re.compile(pattern) for pattern in ignored_on_load(model)]
    held = set(model.state_dict())
    return sorted(name for name in _headers(folder) if name not in held and any(pattern.search(name) for pattern in patterns))


def pretrained(model: ModelConfig, task: Task = "causal", drawn: Source | None = None) -> Pretrained:
    """The source of the weights that `model.path` names. Raises ConfigError, CheckpointError."""
    assert model.path is not None
    return Pretrained(folder_of(model.path), task, drawn, model.remote_code)
