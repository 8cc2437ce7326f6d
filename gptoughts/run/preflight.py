"""Pre-flight checks and the start-up summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from torch import nn

from gptoughts.config import hf_spec
from gptoughts.config.loader import Recipe, Resolved
from gptoughts.config.tasks import BENCHMARKS, task_of
from gptoughts.console import count
from gptoughts.data.chat.marking import Style, first_rows, render_row, row_summary
from gptoughts.data.corpus import Corpus, TableCorpus
from gptoughts.engine.from_recipe import ModelBundle
from gptoughts.errors import ConfigError, DataError
from gptoughts.inference.generate.write import check_sampling
from gptoughts.planning.resolve import Plan
from gptoughts.run import resume

SHOWN_SAMPLES = 3
"""Rows of chat and question data printed before training on them."""


def check(recipe: Recipe, corpus: Corpus, bundle: ModelBundle) -> None:
    """Raise ConfigError for settings that would fail only after hours of training."""
    if recipe.model.family == "hf":
        hf_spec.documents(recipe.model)  # refuses files that could not be saved with the weights
    if bundle.mask_id is not None:
        check_sampling(recipe)
    if recipe.eval.patience and not corpus.validates:
        raise ConfigError("eval.patience: needs a validation split", fix="--data.val-fraction 0.05, or --data.val-path FILE")
    check_benchmarks(recipe, corpus)


def check_benchmarks(recipe: Recipe, corpus: Corpus) -> None:
    """Read the rows of `eval.tasks`. Raises ConfigError for a model or data that they cannot run on, DataError for invalid rows."""
    names, settings = recipe.eval.benchmarks, recipe.eval
    if not names:
        return
    if not task_of(recipe).benchmarks:
        raise ConfigError(f"eval.tasks {settings.tasks}: needs a language model", found=f"objective {recipe.objective}")
    if not corpus.validates:
        raise ConfigError("eval.tasks: needs a validation split", fix="--data.val-fraction 0.05, or --data.val-path FILE")
    for name in names:
        import_module(BENCHMARKS[name]).read_examples(settings.task_data, settings.task_limit or None)


def check_packing(recipe: Recipe, bundle: ModelBundle, model: nn.Module) -> None:
    """Raise ConfigError if conversations would be packed for a model that does not keep them apart."""
    if recipe.data.format == "chat" and recipe.data.packing and not getattr(model, "packs", True):
        raise ConfigError(
            f"data.packing: {bundle.spec.family} attends across the conversations of a packed row", fix="--data.packing false"
        )


def sample_prompt(resolved: Resolved, corpus: Corpus) -> str:
    """Return the recipe's prompt; an empty one if it is the default and the tokenizer lacks one of its characters."""
    prompt = resolved.recipe.sample.prompt
    try:
        corpus.tokenizer.encode(prompt)
    except DataError as error:
        if resolved.given("sample.prompt"):
            raise ConfigError(f"sample.prompt: {error}", found=repr(prompt)) from None
        return ""
    return prompt


def introduction(
    recipe: Recipe, corpus: Corpus, bundle: ModelBundle, model: nn.Module, source: Any, style: Style
) -> Iterator[str]:
    """Yield lines about the model, its weights and its data."""
    spec = bundle.spec
    parameters = f"{count(spec.parameters)} parameters" if spec.parameters else "parameters n/a"
    yield f"model {spec.family}, {parameters}; data {corpus.folder}: {count(corpus.train_tokens)} tokens"
    if bundle.base is not None:
        from gptoughts.models.adapters.merge import summary  # imports peft

        yield summary(model)
    yield from (f"note: {note}" for note in getattr(source, "notes", ()))
    if isinstance(corpus, TableCorpus):
        for number, row in enumerate(first_rows(corpus, recipe, SHOWN_SAMPLES), 1):
            yield f"--- sample {number}: {row_summary(row)}\n{render_row(corpus.tokenizer, row, style)}"
        yield "---"


def resume_lines(point: resume.ResumePoint, now: Mapping[str, Any], plan: Plan) -> Iterator[str]:
    """Yield lines about the checkpoint that a run resumes from, and what changed since."""
    differing = resume.changes(point, now)
    exact = not differing and not plan.not_repeatable
    words = ", bit for bit" if exact else "; not bit for bit, because of (old | new):" if differing else ""
    yield f"resuming from {point.folder}{words}"
    yield from (f"  {line}" for line in differing)
