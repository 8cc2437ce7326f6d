"""Tasks, data formats and benchmarks: what an objective needs from data, model head and evaluation. One line each, in registries.

Add a data format: a module under `data/` with a function from a recipe to a Corpus, and its line in FORMATS. Add a task: its objective
under `engine/objectives/`, and its line in TASKS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol

Head = Literal["causal", "question-answering"]


@dataclass(frozen=True)
class Format:
    """A data format: a value of `data.format`."""

    corpus: str
    """`module:function` from a recipe to its Corpus."""
    is_padded: bool = False
    """Whether rows end in padding, so that attention needs a mask."""


FORMATS: Mapping[str, Format] = {
    "text": Format("gptoughts.data.corpus:text_corpus_of"),
    "chat": Format("gptoughts.data.corpus:chat_corpus_of", is_padded=True),
    "squad": Format("gptoughts.data.corpus:squad_corpus_of", is_padded=True),
}
"""Name -> data format."""


@dataclass(frozen=True)
class Task:
    """What training by an objective involves: a value of `objective`."""

    objective: str = ""
    """`module:function` from (recipe, tokenizer, mask token id or None) to the Objective."""
    formats: tuple[str, ...] = ("text", "chat")
    """Data formats that the objective reads."""
    head: Head = "causal"
    """Head of a transformers model."""
    over_vocabulary: bool = True
    """Whether the head scores every token of the vocabulary at every position."""
    masks_tokens: bool = False
    """Whether it fills in masked tokens with a bidirectional model."""
    adapters: bool = True
    """Whether an adapter alone can be trained; a new head must be trained itself."""
    scores: str = ""
    """`module:function` from (engine, table, questions, out=folder) to the task's own scores on the validation split."""
    evaluation: str = ""
    """Command of `gptoughts eval` for models that the loss alone does not evaluate."""
    samples: bool = True
    """Whether the model generates text."""
    benchmarks: bool = False
    """Whether the model gives likelihoods of texts, which BENCHMARKS compare."""


TASKS: Mapping[str, Task] = {
    "next-token": Task("gptoughts.engine.objectives.base:next_token", benchmarks=True),
    "masked-diffusion": Task(
        "gptoughts.engine.objectives.masked_diffusion:masked_diffusion",
        masks_tokens=True,
        evaluation="likelihood",
        benchmarks=True,
    ),
    "question-answering": Task(
        "gptoughts.engine.objectives.span_qa:question_answering",
        formats=("squad",),
        head="question-answering",
        over_vocabulary=False,
        adapters=False,
        scores="gptoughts.inference.eval.squad:evaluate",
        evaluation="squad",
        samples=False,
    ),
}
"""Name -> task."""

BENCHMARKS: Mapping[str, str] = {"hellaswag": "gptoughts.inference.eval.hellaswag"}
"""Benchmark that training can run at each validation (`eval.tasks`) -> module with `read_examples` and `prepare`."""

PLUGIN_TASK = Task()
"""The task of an objective that a plugin brings."""


class _Recipe(Protocol):
    @property
    def objective(self) -> str:
        """The recipe's objective; the recipe itself is checked against FORMATS and so imports this module."""


def task_of(recipe: _Recipe) -> Task:
    """Return the task of the recipe's objective."""
    return TASKS.get(recipe.objective, PLUGIN_TASK)


def load(entry: str) -> Any:
    """Import `module:attribute`."""
    module, _, attribute = entry.partition(":")
    return getattr(import_module(module), attribute)
