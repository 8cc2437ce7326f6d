"""Config of a transformers model: read offline, without its own code unless allowed, with the recipe's dropout."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForQuestionAnswering, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES
from transformers.utils import logging

from gptoughts.config.hf_spec import read_config
from gptoughts.config.model_path import folder_with_code
from gptoughts.config.recipe import ModelConfig
from gptoughts.errors import ConfigError
from gptoughts.models.meta import on_meta

Task = Literal["causal", "question-answering"]

# transformers imports DeepSpeed where it is installed, which says on standard output that it found no GPU: in the middle of JSON.
getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())

LOADERS = {
    "causal": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "language model that predicts the next token"),
    "question-answering": (
        AutoModelForQuestionAnswering,
        MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        "question-answering model",
    ),
}
DROPOUT_KEYS = re.compile(r"dropout|pdrop|layerdrop|drop_rate")
ATTENTION_KEYS = re.compile(r"att")


BUILD_ERRORS = (
    ValueError, TypeError, LookupError, AttributeError, ImportError, AssertionError, ArithmeticError, RuntimeError
)  # fmt: skip
"""What constructors of models raise: transformers checks few of the values in config.json."""
KERNEL_KEYS = re.compile(r"_?(attn|experts)_implementation(_internal)?|use_kernels|_?kernel_config")
"""Keys of a config.json that can name a package of kernels on a hub, which is code: the plan chooses the kernels."""


FLOAT_TAG, SPECIAL_FLOATS = "__float__", ("Infinity", "-Infinity", "NaN")
"""How transformers writes floats that JSON lacks: {"__float__": "Infinity"}."""


def open_config(model: ModelConfig, task: Task = "causal", quantized: bool = False) -> tuple[PretrainedConfig, list[str]]:
    """Return transformers' config of the recipe's model, and notes for the user. Raises ConfigError.

    Dropout is a training option: rates become `model.dropout`, on attention 0. Quantized weights are dequantized, so their
    quantization_config is dropped, unless they shall stay `quantized`.
    """
    content, notes = special_floats(without_kernels(read_config(model))), list[str]()
    kind = content["model_type"]
    if model.remote_code is not None:
        return _remote_config(model), [f"model.remote_code: code of {model.remote_code} is executed"]
    if kind not in CONFIG_MAPPING:
        own_code = "auto_map" in content
        problem = f"model {model.path or model.config}: model_type unknown to transformers"
        problem += "; the model's own code is not executed by default" if own_code else ""
        raise ConfigError(
            problem, found=f"{kind!r:.100}", fix=f"--model.remote_code {model.path}" if own_code and model.path else ""
        )
    _, names, description = LOADERS[task]
    if kind not in names:
        raise ConfigError(f"model {model.path or model.config}: transformers has no {description} for model_type {kind!r:.100}")
    if content.pop("auto_map", None):
        notes.append(f"config.json: own code (auto_map) ignored, transformers' {names[kind]} is used instead")
    if not quantized:
        content.pop("quantization_config", None)
    try:
        config = CONFIG_MAPPING[kind].from_dict(content)
    except Exception as error:  # classes of transformers check in their own ways
        raise ConfigError(f"model {model.path or model.config}: invalid config.json: {first_line(error)}") from error
    notes += _set_dropout(config, model.dropout) if model.dropout is not None else []
    config.use_cache = True
    return config, notes


def without_kernels(content: Any) -> Any:
    """Return the values of a config.json without those that choose kernels, also in the configs nested in it."""
    if isinstance(content, dict):
        return {key: without_kernels(value) for key, value in content.items() if not KERNEL_KEYS.fullmatch(key)}
    return [without_kernels(value) for value in content] if isinstance(content, list) else content


def special_floats(content: Any) -> Any:
    """Return the values of a config.json with transformers' spelling of infinity and NaN as floats."""
    if isinstance(content, dict):
        tag = content.get(FLOAT_TAG)
        if len(content) == 1 and tag in SPECIAL_FLOATS:
            return float(tag)
        return {key: special_floats(value) for key, value in content.items()}
    return [special_floats(value) for value in content] if isinstance(content, list) else content


def vocabulary(config: PretrainedConfig) -> int:
    """Return the embedding rows of a config; models that read images or sound too have them in the config of their text."""
    return int(config.get_text_config().vocab_size)


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's text, with the next one after a colon, or the name of its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__


def _remote_config(model: ModelConfig) -> PretrainedConfig:
    if model.remote_code != model.path or model.path is None:
        problem = f"model.remote_code: must equal model.path, {model.path}"
        raise ConfigError(problem, found=repr(model.remote_code), fix=f"--model.path {model.remote_code}")
    folder = folder_with_code(model.path)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
    except (OSError, ImportError, ValueError, KeyError, AttributeError) as error:  # a missing file, package or class
        raise ConfigError(f"model.remote_code: code of {model.remote_code!r} cannot be used: {first_line(error)}") from error


def _set_dropout(config: PretrainedConfig, rate: float) -> list[str]:
    changed = []
    for key, value in sorted(vars(config).items()):
        if not DROPOUT_KEYS.search(key) or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        target = 0.0 if ATTENTION_KEYS.search(key) or "layerdrop" in key else rate
        if value != target:
            setattr(config, key, target)
            changed.append(f"{key} {value:g} -> {target:g}")
    return [f"model.dropout replaces the model's rates: {', '.join(changed)}"] if changed else []


def model_class(task: Task, model: ModelConfig) -> tuple[Any, dict[str, Any]]:
    """Return transformers' loader for `task` and its keyword arguments about a model's own code."""
    return LOADERS[task][0], {"trust_remote_code": model.remote_code is not None}


def whole_model(model: ModelConfig, task: Task, rows: int) -> Any:
    """Build transformers' model on meta with a vocabulary of `rows` and config.json's dropout, for export."""
    config, _ = open_config(model.model_copy(update={"dropout": None}), task)
    config.get_text_config().vocab_size = rows
    loader, kwargs = model_class(task, model)
    with on_meta(), building(model):
        return loader.from_config(config, attn_implementation="eager", dtype=torch.float32, **kwargs)


@contextmanager
def building(model: ModelConfig) -> Iterator[None]:
    """Raise ConfigError for what a constructor of transformers raises where a value of config.json has no meaning."""
    try:
        yield
    except BUILD_ERRORS as error:
        raise ConfigError(f"model {model.path or model.config}: transformers cannot build it: {first_line(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and its report of missing keys, which the caller checks."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
