"""Source of pretrained weights in a Hugging Face folder: safetensors only, and every skipped tensor is reported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from gptoughts.config.hf_spec import resolve_model_folder
from gptoughts.config.loader import shown
from gptoughts.config.recipe import ModelConfig
from gptoughts.errors import CheckpointError
from gptoughts.models.hf.config import Task, first_line, model_class, open_config, quiet
from gptoughts.models.meta import on_meta
from gptoughts.models.sources import Source
from gptoughts.models.torch_internals import ignored_on_load
from gptoughts.models.weight_files import (
    INDEX,
    SINGLE,
    checked,
    pickles,
    read_header,
    read_json,
    refuse_adapter,
    refuse_larger,
    shards_of,
)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Floating-point dtypes of safetensors for computation, widest first."""
MAX_LISTED = 8
"""Keys listed in a message."""


class Pretrained:
    """Weights in a folder by transformers' names, in their stored dtype.

    transformers' loader converts them: it fuses experts and dequantizes block FP8. Each value is released once it was read.
    `drawn` initializes a head that the folder does not have (question answering). `notes` are for the user.
    """

    def __init__(
        self, folder: Path, task: Task = "causal", drawn: Source | None = None, remote_code: str | None = None
    ) -> None:
        self.folder, self.notes = folder, list[str]()
        self._drawn = drawn
        refuse_adapter(folder)
        refuse_pickles(folder)
        # Dropout does not matter for weights.
        recipe = ModelConfig(family="hf", path=remote_code or str(folder), remote_code=remote_code)
        config, _ = open_config(recipe, task)
        model, report = self._load(config, task, recipe)
        self._parts: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
        self._new = self._check_keys(model, report, task)
        for name in self._new:
            self._parts.pop(name, None)
        self._unused: list[str] = []

    def _load(self, config: PretrainedConfig, task: Task, recipe: ModelConfig) -> tuple[PreTrainedModel, Mapping[str, Any]]:
        loader, kwargs = model_class(task, recipe)
        with on_meta():
            planned = sum(parameter.numel() for parameter in loader.from_config(config, **kwargs).parameters())
        refuse_larger(planned, files_of(self.folder), shown(self.folder / "config.json"))
        quantized = _quantization(self.folder)
        if quantized is not None:
            config.quantization_config = quantized
        with quiet():
            try:
                return loader.from_pretrained(
                    self.folder, config=config, dtype=_dtype(self.folder), local_files_only=True, use_safetensors=True,
                    output_loading_info=True, attn_implementation="eager", ignore_mismatched_sizes=True, **kwargs,
                )  # fmt: skip
            except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
                raise CheckpointError(f"{shown(self.folder)}: weights cannot be read: {first_line(error)[:300]}") from error

    def _check_keys(self, model: PreTrainedModel, report: Mapping[str, Any], task: Task) -> set[str]:
        """Return names to initialize. Raises CheckpointError if others are missing, wrongly shaped or unused."""
        missing, unexpected = set(report["missing_keys"]), sorted(report["unexpected_keys"])
        wrong = [
            f"{name} has shape {tuple(stored)}, config.json requires {tuple(required)}"
            for name, stored, required in report["mismatched_keys"]
        ]
        new: set[str] = set()
        if task == "question-answering":
            new = {name for name in missing if not name.startswith(f"{model.base_model_prefix}.")}
            other = [name for name in unexpected if _of_another_task(name, model)]
            if other:
                self.notes.append(f"{shown(self.folder)}: ignored heads of other tasks: {_listed(other)}")
            unexpected = [name for name in unexpected if name not in other]
        problems = [
            f"{word}: {_listed(names)}"
            for word, names in (
                ("missing", sorted(missing - new)),
                ("wrong shape", wrong),
                ("unexpected", unexpected),
            )
            if names
        ]
        problems += [
            f"conversion failed: {line}" for line in [*report.get("error_msgs", []), *report.get("conversion_errors", {})]
        ]
        problems += _unequal_ties(model)
        if problems:
            raise CheckpointError(f"{shown(self.folder)}: weights do not match {type(model).__name__}: {'; '.join(problems)}")
        if new:
            self.notes.append(f"{shown(self.folder)}: no head for this task, initialized: {_listed(sorted(new))}")
        ignored = _ignored(self.folder, model)
        if ignored:
            self.notes.append(f"{shown(self.folder)}: ignored by transformers: {_listed(ignored)}")
        return new

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return the pretrained value of the parameter `name`, the initial value for a new head, or None."""
        if name in self._new:
            return self._drawn.tensor(name, shape) if self._drawn is not None else None
        value = self._parts.pop(name, None)
        return None if value is None else value.detach()

    def buffer(self, name: str) -> Tensor | None:
        """Return the value of a persistent buffer, such as a routing bias."""
        return self.tensor(name, torch.Size())

    def unused(self) -> list[str]:
        """Return an empty list: unexpected weights were refused when the folder was opened."""
        return self._unused


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _of_another_task(name: str, model: PreTrainedModel) -> bool:
    """Return whether `name` is a pooler or another head beside the encoder."""
    base = model.base_model
    first = name.removeprefix(f"{model.base_model_prefix}.").split(".")[0]
    return first not in dict(base.named_children())


def _unequal_ties(model: PreTrainedModel) -> list[str]:
    """Return problems of weights that config.json ties but whose stored values differ."""
    mapping = model.get_expanded_tied_weights_keys(all_submodels=True)
    return [
        f"{alias} and {owner} differ, but config.json ties them (set tie_word_embeddings to false there)"
        for alias, owner in mapping.items()
        if model.get_parameter(alias) is not model.get_parameter(owner)
    ]


# --- files


def files_of(folder: Path) -> list[Path]:
    """Return the safetensors files of a model. Raises CheckpointError if there are none, or if an indexed shard is missing."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return [checked(single)]
    if not index.is_file():
        raise CheckpointError(f"{shown(folder)}: no {SINGLE}")
    return [checked(path) for path in shards_of(index)]


def refuse_pickles(folder: Path) -> None:
    """Raise CheckpointError for pickles, which can run code when loaded, with the command that converts them."""
    try:
        files_of(folder)
    except CheckpointError:
        if (folder / SINGLE).is_file() or not (found := pickles(folder)):
            raise
        raise CheckpointError(
            f"{shown(folder / found[0])}: a pickle, which can run code when loaded",
            fix='if you trust it, python -c "import transformers as t; '
            f'm = t.AutoModelForCausalLM.from_pretrained({str(folder)!r}); m.save_pretrained({str(folder)!r})"',
        ) from None


def _headers(folder: Path) -> dict[str, str]:
    """Return tensor name -> dtype from each file's header."""
    return {name: entry["dtype"] for path in files_of(folder) for name, entry in read_header(path).items()}


def _dtype(folder: Path) -> torch.dtype:
    """Return the widest dtype of the weights, so that none is rounded, regardless of config.json; bf16 for FP8, as DeepSeek converts."""
    types = _headers(folder)
    stored = {kind for name, kind in types.items() if not name.endswith("_scale_inv")}
    if any(kind.startswith("F8") for kind in stored):
        return torch.bfloat16
    return next((dtype for kind, dtype in DTYPES.items() if kind in stored), torch.float32)


def stored_dtype(config: ModelConfig) -> torch.dtype | None:
    """Return the widest dtype of a model's weights on disk; None for a model without published weights in safetensors."""
    if not config.path:
        return None
    try:
        return _dtype(resolve_model_folder(config.path))
    except CheckpointError:
        return None  # reported when the weights are read; GGUF has no safetensors


def _quantization(folder: Path) -> dict[str, Any] | None:
    """Return config.json's quantization_config with dequantization enabled. Raises CheckpointError for other methods than FP8."""
    quantization = read_json(folder / "config.json").get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{shown(folder / 'config.json')}: quantization_config must be a table")
    method = quantization.get("quant_method")
    if method != "fp8":
        problem = f"{shown(folder)}: quantized weights of this method cannot be trained"
        raise CheckpointError(problem, found=repr(method), fix="unquantized weights")
    return {**quantization, "dequantize": True}


def _ignored(folder: Path, model: PreTrainedModel) -> list[str]:
    """Return stored tensors that transformers ignores for this model, such as DeepSeek-V3's multi-token prediction layer."""
    patterns = [re.compile(pattern) for pattern in ignored_on_load(model)]
    used = set(model.state_dict())
    return sorted(name for name in _headers(folder) if name not in used and any(pattern.search(name) for pattern in patterns))


def pretrained(model: ModelConfig, task: Task = "causal", drawn: Source | None = None) -> Pretrained:
    """Return the source of the weights at `model.path`. Raises ConfigError, CheckpointError."""
    assert model.path is not None
    return Pretrained(resolve_model_folder(model.path), task, drawn, model.remote_code)
