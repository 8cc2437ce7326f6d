"""What a recipe leaves open is settled by the model that it names: its family, its sizes, its tokenizer. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gptoughts.config import hf_spec, llada_spec
from gptoughts.config.loader import Resolved
from gptoughts.config.recipe import ExpertsConfig, ModelConfig, Recipe
from gptoughts.errors import ConfigError, listed

SIZES = (
    "depth", "width", "heads", "kv_heads", "hidden", "norm", "positions", "mlp", "qk_norm", "tied", "bias", "rope_theta",
)  # fmt: skip
"""Keys of [model] that describe a native model; a Hugging Face model has its own in its config.json."""


def resolve_recipe(resolved: Resolved) -> Resolved:
    """`resolved` with family, sizes and tokenizer from `model.path` or `model.config` where nobody gave them.

    Raises ConfigError where keys contradict the named model, or each other.
    """
    recipe = resolved.recipe
    problems = _contradictions(recipe, resolved)
    if problems:
        raise listed(f"recipe {recipe.name} cannot be used", problems)
    if recipe.objective == "masked-diffusion" and recipe.data.format == "chat":  # a row has one noise level and one answer
        resolved = _with(resolved, {"data.packing": False}, "objective masked-diffusion")
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
    if recipe.model.path and not resolved.given("data.tokenizer"):
        changes["data.tokenizer"] = str(hf_spec.tokenizer_folder(recipe.model))
    hf_spec.check_length(config, recipe.data.sequence_length, named)
    return _with(resolved, changes, named)


def _contradictions(recipe: Recipe, resolved: Resolved) -> list[str]:
    model, problems = recipe.model, []
    if model.path and model.config:
        problems.append("model: give path (pretrained weights) or config (random weights), not both")
    if model.family == "hf" and not (model.path or model.config):
        problems.append("model.family hf: needs model.path (a folder or a hub name) or model.config (a config.json)")
    if model.family not in ("gpt", "hf", "llada") and (model.path or model.config):
        problems.append(
            f"model.family {model.family}: a plugin's models take no model.path or model.config; leave one of them out"
        )
    if model.family == "gpt" and resolved.given("model.family") and (model.path or model.config):
        problems.append("model.family gpt: native models take no model.path or model.config; leave the family out")
    if recipe.objective == "masked-diffusion" and model.family == "gpt" and not model.path:
        problems.append('objective masked-diffusion: reads both ways; set model.family = "llada"')
    if recipe.objective == "next-token" and model.family == "llada":
        problems.append('model.family llada: sees the tokens that it would predict; set objective = "masked-diffusion"')
    if (recipe.objective == "question-answering") != (recipe.data.format == "squad"):
        problems.append(
            f"objective {recipe.objective} does not go with data.format {recipe.data.format}; squad and question-answering do"
        )
    if recipe.data.format == "squad" and not model.path:
        problems.append("data.format squad: needs model.path, the folder of an encoder such as BERT")
    if recipe.data.format == "chat" and recipe.data.tokenizer in ("bytes", "chars", "gpt2", "bpe") and not model.path:
        problems.append(
            "data.format chat: needs a tokenizer with turns; give model.path or data.tokenizer, a folder with tokenizer.json"
        )
    if model.path and resolved.given("data.tokenizer") and recipe.data.tokenizer in ("bytes", "chars", "bpe"):
        problems.append(
            f"data.tokenizer {recipe.data.tokenizer} ({resolved.sources['data.tokenizer']}): pretrained weights know the ids of their "
            "own tokenizer only; leave it out of the recipe"
        )
    if recipe.adapter.kind == "none" and recipe.adapter.base != "full":
        problems.append("adapter.base nf4: quantized weights cannot be trained; give adapter.kind too, such as lora")
    if recipe.adapter.kind != "none" and recipe.objective == "question-answering":
        problems.append("adapter.kind: a new head must be trained whole, and an adapter freezes it; leave [adapter] out")
    return [*problems, *_unheard(recipe)]


def _unheard(recipe: Recipe) -> list[str]:
    """Keys with other values than their defaults that nothing would listen to."""
    data = recipe.data.format
    tables = (
        (recipe.adapter.kind == "none", "adapter", ("rank", "alpha", "dropout", "targets"), "needs adapter.kind, such as lora"),
        (
            recipe.objective != "masked-diffusion",
            "diffusion",
            tuple(type(recipe.diffusion).model_fields),
            'needs objective = "masked-diffusion"',
        ),
        (recipe.model.family in ("gpt", "llada") and not (recipe.model.path or recipe.model.config), "experts", ("balance_weight", "bias_rate"),
         "needs a model with experts (model.path or model.config)"),
        (data != "chat", "data", ("packing", "template", "train_on", "too_long"), 'needs data.format = "chat"'),
        (data != "squad", "data", ("stride",), 'needs data.format = "squad"'),
        (data == "text", "data", ("val_path",), "text is divided by data.val_fraction; it serves chat and squad"),
    )  # fmt: skip
    problems = []
    for deaf, table, keys, why in tables:
        section = getattr(recipe, table)
        fields = type(section).model_fields
        changed = [f"{table}.{key}" for key in keys if getattr(section, key) != fields[key].default]
        if deaf and changed:
            problems.append(f"{', '.join(changed)}: has no effect here; {why}")
    return problems


def _check_experts(recipe: Recipe, config: Mapping[str, Any], named: str) -> None:
    spec = hf_spec.fields_of(config, recipe.data.sequence_length)
    dense = spec["projections"] is not None and not spec["experts"]  # of a type that is not known nothing is claimed
    if dense and recipe.experts != ExpertsConfig():
        raise ConfigError(
            f"[experts] has no effect: the {config['model_type']} of {named} has no experts to balance; leave its keys out"
        )


def _check_direction(recipe: Recipe, native: bool, named: str) -> None:
    """Refuse to learn the next token with a model that sees it, and to fill masks with one that only looks back."""
    if native and recipe.objective == "next-token":
        raise ConfigError(f'{named}: a LLaDA model sees the tokens that it would predict; set objective = "masked-diffusion"')
    if not native and recipe.objective == "masked-diffusion":
        raise ConfigError(f'{named}: masked diffusion reads both ways, and this is no LLaDA; set objective = "next-token"')


def _check_native_sizes(resolved: Resolved, sizes: Mapping[str, Any], named: str) -> None:
    wrong = [
        f"model.{key} = {getattr(resolved.recipe.model, key)} (config.json: {value})"
        for key, value in sizes.items()
        if resolved.given(f"model.{key}") and getattr(resolved.recipe.model, key) not in (value, None)
    ]
    if wrong:
        raise ConfigError(f"{named}: the weights have other sizes than the recipe: {', '.join(wrong)}; leave them out")


def _check_sizes(model: ModelConfig, named: str) -> None:
    default = ModelConfig()
    changed = [f"model.{key}" for key in SIZES if getattr(model, key) != getattr(default, key)]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)}: the sizes of a Hugging Face model stand in {named}'s config.json; change them there"
        )


def _with(resolved: Resolved, changes: dict[str, Any], source: str) -> Resolved:
    tables: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        table, _, leaf = key.rpartition(".")
        if not resolved.given(key) or key == "model.family":
            tables.setdefault(table, {})[leaf] = value
    sections = {table: getattr(resolved.recipe, table).model_copy(update=leaves) for table, leaves in tables.items()}
    sources = {f"{table}.{leaf}": source for table, leaves in tables.items() for leaf in leaves}
    return replace(resolved, recipe=resolved.recipe.model_copy(update=sections), sources={**resolved.sources, **sources})
