"""What can be told before the first step: settings that cannot be, and what the run is about to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from gptoughts.config.loader import Recipe, Resolved
from gptoughts.console import count
from gptoughts.data.chat.marking import Style, first_rows, said, shown
from gptoughts.data.corpus import Corpus, TableCorpus
from gptoughts.engine.from_recipe import ModelBundle
from gptoughts.errors import ConfigError, DataError
from gptoughts.inference.generate.write import check_sampling
from gptoughts.planning.resolve import Plan
from gptoughts.run import resume

SHOWN_SAMPLES = 3
"""Rows of chat and questions that a run prints before it trains on them."""


def check(recipe: Recipe, corpus: Corpus, parts: ModelBundle) -> None:
    """Raise ConfigError for what would only be noticed after hours of training."""
    if parts.mask_id is not None:
        check_sampling(recipe)
    if recipe.eval.patience and not corpus.validates:
        raise ConfigError("eval.patience: there is no validation split; give data.val_fraction or data.val_path")


def check_packing(recipe: Recipe, parts: ModelBundle, model: nn.Module) -> None:
    """Raise ConfigError where conversations would share rows of a model that mixes them."""
    if recipe.data.format == "chat" and recipe.data.packing and not getattr(model, "packs", True):
        raise ConfigError(
            f"{parts.spec.family}: this model does not keep conversations that share a row apart\n  try: --data.packing false"
        )


def sample_prompt(resolved: Resolved, corpus: Corpus) -> str:
    """The recipe's prompt, or an empty one where nobody asked for the default and the tokenizer has no such character."""
    prompt = resolved.recipe.sample.prompt
    try:
        corpus.tokenizer.encode(prompt)
    except DataError as error:
        if resolved.given("sample.prompt"):
            raise ConfigError(f"sample.prompt = {prompt!r}: {error}") from None
        return ""
    return prompt


def introduced(
    recipe: Recipe, corpus: Corpus, parts: ModelBundle, model: nn.Module, source: Any, style: Style
) -> Iterator[str]:
    """Lines about the model, its weights and its data."""
    spec = parts.spec
    parameters = f"{count(spec.parameters)} parameters" if spec.parameters else "parameters n/a"
    yield f"model {spec.family}, {parameters}; data {corpus.folder}: {count(corpus.train_tokens)} tokens"
    if parts.base is not None:
        from gptoughts.models.adapters.adapter import summary  # imports peft

        yield summary(model)
    yield from (f"note: {note}" for note in getattr(source, "notes", ()))
    if isinstance(corpus, TableCorpus):
        for number, row in enumerate(first_rows(corpus, recipe, SHOWN_SAMPLES), 1):
            yield f"--- sample {number}: {said(row)}\n{shown(corpus.tokenizer, row, style)}"
        yield "---"


def resuming(origin: resume.ResumePoint, now: Mapping[str, Any], plan: Plan) -> Iterator[str]:
    """Lines about where a run goes on from, and what is not as it was."""
    differing = resume.changes(origin, now)
    exact = not differing and not plan.not_repeatable
    words = ", bit for bit" if exact else "; no longer bit for bit (old | new):" if differing else ""
    yield f"resumes from {origin.folder}{words}"
    yield from (f"  {line}" for line in differing)
