"""Tasks and data formats: what an objective needs from data, model head and evaluation. One record each, in two registries.

Add a task: its objective under `engine/objectives/`, and a line in TASKS. Add a data format: a module under `data/` with a function
that returns a Corpus, and a line in FORMATS.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from gptoughts.config.recipe import Recipe

Head = Literal["causal", "question-answering"]


@dataclass(frozen=True)
class Format:
    """A data format, the values of `data.format`."""

    corpus: str
    """`module:function` from a recipe to a Corpus."""
    is_padded: bool = False
    """Whether rows end in padding, so that attention needs a mask."""


FORMATS = {
    "text": Format("gptoughts.data.corpus:open_text"),
    "chat": Format("gptoughts.data.corpus:open_chat", is_padded=True),
    "squad": Format("gptoughts.data.corpus:open_squad", is_padded=True),
}
"""Name -> data format."""


@dataclass(frozen=True)
class Task:
    """What training by an objective involves; the values of `objective`."""

    objective: str = ""
    """`module:function` from (recipe, tokenizer, mask id) to the objective."""
    formats: tuple[str, ...] = ("text", "chat")
    """Data formats that it can read."""
    head: Head = "causal"
    """Head of the transformers model."""
    over_vocabulary: bool = True
    """Whether the head scores every token of the vocabulary at every position."""
    masks_tokens: bool = False
    """Whether the model reads both ways and fills in masked tokens."""
    packs_documents: bool = True
    """Whether rows can hold several documents that do not attend to each other."""
    scores: str = ""
    """`module:function` from (engine, table, questions, out folder) to the task's own scores on the validation split."""
    evaluation: str = ""
    """Command of `gptoughts eval` that evaluates it, where the loss alone does not."""
    samples: bool = True
    """Whether the model generates text."""


TASKS = {
    "next-token": Task("gptoughts.engine.objectives.base:next_token"),
    "masked-diffusion": Task(
        "gptoughts.engine.objectives.masked_diffusion:masked_diffusion",
        masks_tokens=True,
        packs_documents=False,
        evaluation="likelihood",
    ),
    "question-answering": Task(
        "gptoughts.engine.objectives.span_qa:question_answering",
        formats=("squad",),
        head="question-answering",
        over_vocabulary=False,
        packs_documents=False,
        scores="gptoughts.inference.eval.squad:evaluate",
        evaluation="squad",
        samples=False,
    ),
}
"""Name -> task."""


def task_of(recipe: Recipe) -> Task:
    """Return the task of the recipe's objective; an objective of a plugin is a causal language-model task."""
    return TASKS.get(recipe.objective, Task())


def load(entry: str) -> Any:
    """Import `module:attribute`."""
    module, _, attribute = entry.partition(":")
    return getattr(import_module(module), attribute)
