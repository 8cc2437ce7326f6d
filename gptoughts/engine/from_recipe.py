"""Build family, objective, model spec and weight sources from a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gptoughts.config import hf_spec
from gptoughts.config.loader import Recipe
from gptoughts.config.model_spec import ModelSpec, embedding_rows, spec_for
from gptoughts.config.model_spec import of as spec_of
from gptoughts.config.tasks import TASKS, load, task_of
from gptoughts.data.tokenizers.tokenizer import Tokenizer
from gptoughts.engine.checkpoint import state as training_state
from gptoughts.engine.engine import Source
from gptoughts.engine.objectives.base import Objective, as_objective
from gptoughts.engine.objectives.masked_diffusion import mask_token
from gptoughts.errors import ConfigError, nearest
from gptoughts.models.family import Family, family_of
from gptoughts.models.gpt import llada_layout
from gptoughts.models.sources import Initialization

if TYPE_CHECKING:
    from gptoughts.models.adapters.folder import BaseRecord


@dataclass(frozen=True)
class ModelBundle:
    """Family, objective and sizes of a recipe's model, shared by training, generation and evaluation."""

    family: Family
    objective: Objective
    rows: int
    """Rows of the embedding."""
    spec: ModelSpec
    base: Family | None = None
    """The family without its adapter; None without an adapter."""
    mask_id: int | None = None
    """Id of the mask token; None where the objective does not mask."""


def model_bundle(
    recipe: Recipe,
    tokenizer: Tokenizer,
    families: Mapping[str, Family],
    objectives: Mapping[str, Any],
    adapter: Path | None = None,
) -> ModelBundle:
    """Build a recipe's ModelBundle; a given folder `adapter` sets the adapter's shape.

    Raises ConfigError for unknown names and sizes that do not match.
    """
    mask_id, words = None, tokenizer.vocab_size
    if task_of(recipe).masks_tokens:
        mask_id = mask_of(recipe, tokenizer)
        words = max(words, mask_id + 1)
    base = _family(recipe, families)
    family = base
    if adapter is not None:
        from gptoughts.models.adapters.folder import adapted_as

        family = adapted_as(base, adapter)
    elif recipe.adapter.kind != "none":
        from gptoughts.models.adapters.adapter import adapted  # imports peft

        family = adapted(base, recipe.adapter)
    if recipe.model.family == "hf":
        rows, spec = hf_spec.rows(recipe.model, words), spec_for(recipe)
    else:
        wanted = embedding_rows(recipe.model, words)
        assert wanted is not None
        rows, spec = wanted, spec_of(recipe.model, recipe.data.sequence_length, words)
    objective = _objective(recipe, mask_id, tokenizer, objectives)
    return ModelBundle(family, objective, rows, spec, None if base is family else base, mask_id)


def mask_of(recipe: Recipe, tokenizer: Tokenizer) -> int:
    """Return the mask token's id: that of the pretrained weights, else the tokenizer's, else a new one. Raises ConfigError."""
    asked = recipe.diffusion.mask_token
    found, _ = mask_token(tokenizer, asked)
    trained = hf_spec.read_config(recipe.model).get("mask_token_id") if recipe.model.path else None
    if trained is None:
        return found
    if asked is not None and trained != found:
        raise ConfigError(
            f"diffusion.mask_token: the weights of {recipe.model.path} use token {trained} as mask",
            found=f"{asked!r}, token {found}",
            fix="leave diffusion.mask_token unset",
        )
    return int(trained)


def _family(recipe: Recipe, families: Mapping[str, Family]) -> Family:
    name = recipe.model.family
    if name in families:
        return families[name]
    if name != "hf":
        return family_of(name)
    from gptoughts.models.hf.family import hf_family  # imports transformers

    return hf_family(recipe.model, task_of(recipe).head)


def _objective(recipe: Recipe, mask_id: int | None, tokenizer: Tokenizer, objectives: Mapping[str, Any]) -> Objective:
    name = recipe.objective
    if name in objectives:
        made = as_objective(objectives[name]())
        if made is None:
            raise ConfigError(f"objective: {name!r} has no __call__, weight or tokens", found=objectives[name])
        return made
    if name not in TASKS:
        known = [*TASKS, *objectives]
        raise ConfigError(f"objective: unknown{nearest(name, known)}; known: {', '.join(known)}", found=repr(name))
    objective: Objective = load(TASKS[name].objective)(recipe, tokenizer, mask_id)
    return objective


def initial_weights(
    recipe: Recipe, parts: ModelBundle, model: nn.Module, device: torch.device, adapter: Path | None = None
) -> Source:
    """Return the source of a new run's weights: pretrained ones if the recipe names them, else initialization.

    model    the model to fill, on meta or not, on `device`
    adapter  folder with a trained adapter to load over the weights

    Raises CheckpointError where the adapter was trained on other weights.
    """
    base = base_weights(recipe, parts.base or parts.family)
    if parts.base is None:
        return base
    from gptoughts.models.adapters.folder import AdapterFolder, check_base
    from gptoughts.models.adapters.weights import AdapterSource

    if adapter is not None:
        check_base(adapter, base_record(recipe))
    saved = None if adapter is None else AdapterFolder(adapter)
    return AdapterSource(base, model, recipe.adapter.kind, recipe.seed, saved, device)


def resumed_weights(recipe: Recipe, parts: ModelBundle, model: nn.Module, device: torch.device, folder: Path) -> Source:
    """Return the source of a checkpoint's weights; for an adapter checkpoint, over the base weights that the recipe names.

    Raises CheckpointError where the adapter was trained on other weights.
    """
    saved = training_state.Weights(folder)
    if parts.base is None:
        return saved
    from gptoughts.models.adapters.folder import check_base
    from gptoughts.models.adapters.weights import AdapterSource

    check_base(folder, base_record(recipe))
    return AdapterSource(base_weights(recipe, parts.base), model, recipe.adapter.kind, recipe.seed, saved, device)


def base_weights(recipe: Recipe, family: Family) -> Source:
    """Return the source of all weights that training starts from, without an adapter."""
    drawn = Initialization(family, recipe.model, recipe.seed) if family.initial else None
    if not recipe.model.path:
        assert drawn is not None
        return drawn
    folder = hf_spec.resolve_model_folder(recipe.model.path)
    if recipe.model.family == "llada":
        return llada_layout.load(folder)
    from gptoughts.models.hf.weights import Pretrained

    return Pretrained(folder, task_of(recipe).head, drawn, recipe.model.remote_code)


def base_record(recipe: Recipe) -> BaseRecord:
    """Return the record of the base weights that an adapter checkpoint keeps."""
    from gptoughts.models.adapters.folder import record_of, record_of_drawn

    if recipe.model.path:
        return record_of(hf_spec.resolve_model_folder(recipe.model.path))
    return record_of_drawn(recipe.model.model_dump(), recipe.seed)


def checkpoint_documents(recipe: Recipe) -> dict[str, str]:
    """Return small files for a checkpoint: a Hugging Face model's config files (under base/), an adapter's base record."""
    kept: dict[str, str] = {}
    if recipe.model.family == "hf":
        kept = {f"base/{name}": text for name, text in hf_spec.documents(recipe.model).items()}
    if recipe.adapter.kind != "none":
        kept["base.json"] = json.dumps(asdict(base_record(recipe)), indent=1)
    return kept
