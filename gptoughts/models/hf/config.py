"""The config of a transformers model as we build it: opened without a hub, its own code refused, dropout as the recipe says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
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

LOADERS = {
    "causal": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "language model that predicts the next token"),
    "question-answering": (
        AutoModelForQuestionAnswering,
        MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        "question-answering model",
    ),
}
RATES = re.compile(r"dropout|pdrop|layerdrop|drop_rate")
ON_ATTENTION = re.compile(r"att")


def open_config(model: ModelConfig, task: Task = "causal") -> tuple[PretrainedConfig, list[str]]:
    """transformers' config of the model that the recipe names, and what a user should know of it. Raises ConfigError.

    Dropout is a choice of each training and no property of weights: rates become `model.dropout`, on attention 0. Quantized
    weights are read as full ones, so their config is not kept.
    """
    content, notes = read_config(model), []
    kind = content["model_type"]
    if model.remote_code is not None:
        return _remote(model), [f"code of {model.remote_code} runs, as model.remote_code asks"]
    if kind not in CONFIG_MAPPING:
        own = " and brings code of its own, which is not run" if "auto_map" in content else ""
        remedy = f"; model.remote_code = {str(model.path)!r} runs it" if own and model.path else ""
        raise ConfigError(
            f"model {model.path or model.config}: transformers does not know the model_type {kind!r}{own}{remedy}"
        )
    _, names, what = LOADERS[task]
    if kind not in names:
        raise ConfigError(f"model {model.path or model.config}: transformers has no {what} for the model_type {kind!r}")
    if content.pop("auto_map", None):
        notes.append(f"config.json names code of its own (auto_map); transformers' {names[kind]} is used instead")
    content.pop("quantization_config", None)
    try:
        config = CONFIG_MAPPING[kind].from_dict(content)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"model {model.path or model.config}: config.json cannot be used: {_first_line(error)}") from error
    notes += _set_dropout(config, model.dropout) if model.dropout is not None else []
    config.use_cache = True
    return config, notes


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _remote(model: ModelConfig) -> PretrainedConfig:
    if model.remote_code != model.path or model.path is None:
        raise ConfigError(
            f"model.remote_code = {model.remote_code!r}: its code runs only where model.path names the same model"
        )
    folder = folder_with_code(model.path)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
    except (OSError, ImportError, ValueError, KeyError, AttributeError) as error:  # a file, a package or a class is not there
        raise ConfigError(
            f"model.remote_code = {model.remote_code!r}: its code cannot be used: {_first_line(error)}"
        ) from error


def _set_dropout(config: PretrainedConfig, rate: float) -> list[str]:
    changed = []
    for key, value in sorted(vars(config).items()):
        if not RATES.search(key) or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        wanted = 0.0 if ON_ATTENTION.search(key) or "layerdrop" in key else rate
        if value != wanted:
            setattr(config, key, wanted)
            changed.append(f"{key} {value:g} -> {wanted:g}")
    return [f"dropout is the recipe's (model.dropout): {', '.join(changed)}"] if changed else []


def model_class(task: Task, model: ModelConfig) -> tuple[Any, dict[str, Any]]:
    """transformers' loader for `task`, and the words with which it runs a model's own code, or does not."""
    return LOADERS[task][0], {"trust_remote_code": model.remote_code is not None}


def whole_model(model: ModelConfig, task: Task, rows: int) -> Any:
    """transformers' own model on meta with `rows` embedding rows, and config.json's dropout: what is saved for others."""
    config, _ = open_config(model.model_copy(update={"dropout": None}), task)
    config.vocab_size = rows
    loader, words = model_class(task, model)
    with on_meta():
        return loader.from_config(config, attn_implementation="eager", dtype=torch.float32, **words)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and its report of missing keys, where its caller judges what was found."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
