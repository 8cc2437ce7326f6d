"""What a validation measures beside its loss: scores of the task, benchmarks, and bytes of the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path

from gptoughts.config.tasks import BENCHMARKS, load, task_of
from gptoughts.console import Progress
from gptoughts.data.corpus import TableCorpus, TextCorpus
from gptoughts.engine.distributed.shards import gathered_outside_blocks
from gptoughts.engine.engine import Engine
from gptoughts.inference.eval.continuations import encoder_of, tokenizer_settings
from gptoughts.inference.eval.text_bytes import LabelBytes, has_byte_tokens
from gptoughts.run.session import Session

Scores = Callable[[Engine], Mapping[str, float]]


def scores_of(session: Session, out: Path) -> Scores | None:
    """Return a function to the scores of the task and of the benchmarks in `eval.tasks`; None if there are none.

    A collective, if weights are sharded. `out` is the folder for predictions.
    """
    parts = [*_task_scores(session, out), *(_benchmark(session, name) for name in session.job.recipe.eval.benchmarks)]
    if not parts:
        return None

    def scores(engine: Engine) -> Mapping[str, float]:
        with gathered_outside_blocks(engine.bare):
            return {name: value for part in parts for name, value in part(engine).items()}

    return scores


def _task_scores(session: Session, out: Path) -> Iterator[Scores]:
    """Yield a function to the task's own scores on the validation split, if it has some."""
    corpus, task = session.corpus, task_of(session.job.recipe)
    if task.scores and isinstance(corpus, TableCorpus) and corpus.questions is not None:
        table, questions, evaluate = corpus.tables["val"], corpus.questions, load(task.scores)
        yield lambda engine: evaluate(engine, table, questions, out=out)


def _benchmark(session: Session, name: str) -> Scores:
    """Tokenize the rows of a benchmark, and return a function to its scores."""
    recipe, module = session.job.recipe, import_module(BENCHMARKS[name])
    assert session.corpus is not None
    encoder = encoder_of(session.corpus.tokenizer, tokenizer_settings(recipe))
    examples = module.read_examples(recipe.eval.task_data, recipe.eval.task_limit or None)
    prepared, share = module.prepare(encoder, recipe.data.sequence_length, examples), recipe.train.global_batch
    if prepared.truncated:
        session.console.say(f"note: {name}: {prepared.truncated:,} endings follow a context cut to the model's length")

    def scores(engine: Engine) -> Mapping[str, float]:
        batch, report = engine.micro_batch or max(1, share // engine.ranks.size), Progress(session.console, name)
        found = prepared.scores(engine, batch=batch, mask_id=session.bundle.mask_id, report=report)
        return {**{f"{name}_{score}": value for score, value in found.items()}, f"{name}_rows": len(examples)}

    return scores


def label_bytes(session: Session) -> LabelBytes | None:
    """Return the counter of bytes of a validation's labels, for bits per byte; None where tokens have no bytes of their own."""
    corpus = session.corpus
    if session.job.recipe.objective != "next-token" or not isinstance(corpus, TextCorpus):
        return None
    return LabelBytes(corpus.tokenizer) if has_byte_tokens(corpus.tokenizer) else None
