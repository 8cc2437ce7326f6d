"""Complete a recipe from the model it names (family, sizes, tokenizer) and check keys across tables. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gptoughts.config import hf_spec, llada_spec
from gptoughts.config.loader import Resolved
from gptoughts.config.recipe import ExpertsConfig, ModelConfig, Recipe
from gptoughts.config.tasks import BENCHMARKS, TASKS, task_of
from gptoughts.errors import ConfigError, describe, listed, nearest

SIZES = (
    "depth", "width", "heads", "kv_heads", "hidden", "norm", "positions", "mlp", "qk_norm", "tied", "bias", "rope_theta",
)  # fmt: skip
"""Keys of [model] with the sizes of a native model; those of a Hugging Face model are in its config.json."""


def resolve_recipe(resolved: Resolved, only_planned: bool = False) -> Resolved:
    """Return `resolved` with family, sizes and tokenizer of `model.path` or `model.config`, unless given. A recipe that is only planned
    needs no tokenizer.

    Raises ConfigError if keys contradict the model or each other.
    """
    recipe = resolved.recipe
    problems = _contradictions(recipe, resolved)
    if problems:
        raise listed(f"recipe {recipe.name}", problems)
    if task_of(recipe).masks_tokens and recipe.data.format == "chat":  # a row has one noise level
        resolved = _with(resolved, {"data.packing": False}, f"objective {recipe.objective}")
        recipe = resolved.recipe
    if recipe.model.path is None and recipe.model.config is None:
        return resolved
    config = hf_spec.read_config(recipe.model)
    named = "model.path" if recipe.model.path else "model.config"
    native = config.get("model_type") == "llada" or recipe.model.family == "llada"
    changes: dict[str, Any] = {"model.family": "llada" if native else "hf"}
    if native:
        sizes = llada_spec.sizes(config)
        _check_native_sizes(resolved, sizes, named)
        changes |= {f"model.{key}": value for key, value in sizes.items()}
    else:
        _check_sizes(recipe.model, named)
        _check_experts(recipe, config, named)
    _check_direction(recipe, native, named)
    if (
        recipe.model.path
        and not resolved.given("data.tokenizer")
        and not (only_planned and not hf_spec.has_tokenizer(recipe.model))
    ):
        changes["data.tokenizer"] = str(hf_spec.tokenizer_folder(recipe.model))
    hf_spec.check_length(config, recipe.data.sequence_length, named)
    return _with(resolved, changes, named)


def _contradictions(recipe: Recipe, resolved: Resolved) -> list[str]:
    model, problems = recipe.model, []
    if model.path and model.config:
        problems.append("model: path (pretrained weights) and config (random weights) exclude each other")
    if model.family == "hf" and not (model.path or model.config):
        problems.append("model.family hf: needs model.path (folder or hub name) or model.config (config.json)")
    if model.family not in ("gpt", "hf", "llada") and (model.path or model.config):
        problems.append(f"model.family {model.family}: a plugin's model takes no model.path or model.config")
    if model.family == "gpt" and resolved.given("model.family") and (model.path or model.config):
        problems.append(
            describe("model.family gpt: a native model takes no model.path or model.config", fix="leave model.family out")
        )
    if task_of(recipe).masks_tokens and model.family == "gpt" and not model.path:
        problems.append(describe(f"objective {recipe.objective}: needs a bidirectional model", fix='model.family = "llada"'))
    if recipe.objective == "next-token" and model.family == "llada":
        problems.append(
            describe(
                "model.family llada: bidirectional, cannot learn next-token prediction", fix='objective = "masked-diffusion"'
            )
        )
    if recipe.data.format not in task_of(recipe).formats:
        others = [name for name, task in TASKS.items() if recipe.data.format in task.formats]
        problems.append(
            describe(
                f"objective {recipe.objective}: incompatible with data.format {recipe.data.format}",
                fix=f"objective = {others[0]!r}" if others else f"data.format = {task_of(recipe).formats[0]!r}",
            )
        )
    if recipe.data.format == "squad" and not model.path:
        problems.append("data.format squad: needs model.path of an encoder such as BERT")
    if recipe.data.format == "chat" and recipe.data.tokenizer in ("bytes", "chars", "gpt2", "bpe") and not model.path:
        problems.append(
            describe(
                f"data.format chat: needs a tokenizer with chat tokens, not {recipe.data.tokenizer}",
                fix="model.path or data.tokenizer with a tokenizer.json",
            )
        )
    if model.path and resolved.given("data.tokenizer") and recipe.data.tokenizer in ("bytes", "chars", "bpe"):
        problems.append(
            describe(
                f"data.tokenizer {recipe.data.tokenizer} ({resolved.sources['data.tokenizer']}): pretrained weights need their own tokenizer",
                fix="leave data.tokenizer out",
            )
        )
    if recipe.adapter.kind == "none" and recipe.adapter.base != "full":
        problems.append(describe("adapter.base nf4: quantized weights cannot be trained", fix="--adapter.kind lora"))
    if recipe.adapter.kind != "none" and not task_of(recipe).adapters:
        problems.append(
            describe("adapter.kind: an adapter freezes the new head, which must be trained", fix="leave [adapter] out")
        )
    problems += [
        describe(f"eval.tasks: no benchmark {name!r}{nearest(name, BENCHMARKS)}", fix=f"one of {', '.join(BENCHMARKS)}")
        for name in recipe.eval.benchmarks
        if name not in BENCHMARKS
    ]
    return [*problems, *_unused(recipe)]


def _unused(recipe: Recipe) -> list[str]:
    """Return the changed keys that have no effect: setting an ignored option is an error."""
    data = recipe.data.format
    tables = (
        (recipe.adapter.kind == "none", "adapter", ("rank", "alpha", "dropout", "targets"), "--adapter.kind lora"),
        (
            not task_of(recipe).masks_tokens,
            "diffusion",
            tuple(type(recipe.diffusion).model_fields),
            'objective = "masked-diffusion"',
        ),
        (recipe.model.family in ("gpt", "llada") and not (recipe.model.path or recipe.model.config), "experts", ("balance_weight", "bias_rate"),
         "model.path or model.config of a model with experts"),
        (data != "chat", "data", ("packing", "template", "train_on", "too_long"), 'data.format = "chat"'),
        (data != "squad", "data", ("stride",), 'data.format = "squad"'),
        (not recipe.eval.benchmarks, "eval", ("task_limit", "task_data"), 'eval.tasks = "hellaswag"'),
        (data == "text", "data", ("val_path",), "data.val_fraction, which splits text; data.val_path is for chat and squad"),
    )  # fmt: skip
    problems = []
    for unused, table, keys, fix in tables:
        section = getattr(recipe, table)
        fields = type(section).model_fields
        changed = [f"{table}.{key}" for key in keys if getattr(section, key) != fields[key].default]
        if unused and changed:
            problems.append(describe(f"{', '.join(changed)}: has no effect", fix=fix))
    return problems


def _check_experts(recipe: Recipe, config: Mapping[str, Any], named: str) -> None:
    spec = hf_spec.fields_of(config, recipe.data.sequence_length)
    dense = spec["projections"] is not None and not spec["experts"]  # False for unknown model types
    if dense and recipe.experts != ExpertsConfig():
        raise ConfigError(
            f"experts: has no effect, the {config['model_type']} of {named} has no experts", fix="leave [experts] out"
        )


def _check_direction(recipe: Recipe, native: bool, named: str) -> None:
    """Raise ConfigError for next-token with a bidirectional model and masked diffusion with a causal one."""
    if native and recipe.objective == "next-token":
        raise ConfigError(
            f"{named}: a LLaDA model is bidirectional, cannot learn next-token prediction", fix='objective = "masked-diffusion"'
        )
    if not native and task_of(recipe).masks_tokens:
        raise ConfigError(f"{named}: masked diffusion needs a LLaDA model, this is not one", fix='objective = "next-token"')


def _check_native_sizes(resolved: Resolved, sizes: Mapping[str, Any], named: str) -> None:
    wrong = [
        f"model.{key} = {getattr(resolved.recipe.model, key)} (config.json: {value})"
        for key, value in sizes.items()
        if resolved.given(f"model.{key}") and getattr(resolved.recipe.model, key) not in (value, None)
    ]
    if wrong:
        raise ConfigError(f"{named}: sizes differ from the recipe: {', '.join(wrong)}", fix="leave these keys out")


def _check_sizes(model: ModelConfig, named: str) -> None:
    default = ModelConfig()
    changed = [f"model.{key}" for key in SIZES if getattr(model, key) != getattr(default, key)]
    if changed:
        raise ConfigError(f"{', '.join(changed)}: not used with {named}", fix="set the sizes in its config.json")


def _with(resolved: Resolved, changes: dict[str, Any], source: str) -> Resolved:
    tables: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        table, _, leaf = key.rpartition(".")
        if not resolved.given(key) or key == "model.family":
            tables.setdefault(table, {})[leaf] = value
    sections = {table: getattr(resolved.recipe, table).model_copy(update=leaves) for table, leaves in tables.items()}
    sources = {f"{table}.{leaf}": source for table, leaves in tables.items() for leaf in leaves}
    return replace(resolved, recipe=resolved.recipe.model_copy(update=sections), sources={**resolved.sources, **sources})
