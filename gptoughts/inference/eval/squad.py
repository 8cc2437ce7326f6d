"""SQuAD evaluation: exact match and F1 of predicted spans, with and without unanswerable questions.

Metrics as in the official SQuAD 2.0 script (Rajpurkar, Jia and Liang 2018), which equals the SQuAD 1.1 script if every question has
an answer. Spans are searched exhaustively, not only among the best few starts and ends.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gptoughts.data.device import to_device
from gptoughts.data.squad.examples import PADDING, TRAINED, Questions
from gptoughts.data.squad.question import Question
from gptoughts.data.squad.windows import Reader, windows
from gptoughts.data.table import Table
from gptoughts.engine.engine import Engine
from gptoughts.engine.objectives.span_qa import span_scores
from gptoughts.errors import RunError
from gptoughts.files import write_json

N_BEST = 20
LONGEST = 30
"""Maximum answer length in tokens."""
INPUTS = ("input_ids", "token_types", "mask")
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
Score = Callable[[str, Iterable[str]], float]


@dataclass(frozen=True)
class Span:
    """A span of the context. `score`: start logit of its first token plus end logit of its last."""

    text: str
    score: float
    start: int
    """Index of the first character."""


@dataclass(frozen=True)
class Reading:
    """The model's predictions for one question."""

    spans: tuple[Span, ...]
    """Best spans with distinct texts, best first; at least one."""
    null: float
    """Score of no answer: [CLS] as start and end, minimum over windows."""

    @property
    def null_odds(self) -> float:
        """Score of no answer minus score of the best span."""
        return self.null - self.spans[0].score

    def text(self, threshold: float | None) -> str:
        """Return the answer, or an empty string if `null_odds` exceeds `threshold`. None: always answer."""
        return "" if threshold is not None and self.null_odds > threshold else self.spans[0].text


# Prediction.


def best_spans(start: Tensor, end: Tensor, allowed: Tensor, longest: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the `count` best spans of at most `longest` tokens in each row, with both ends on `allowed` tokens.

    `start`, `end`, `allowed` are B T. Returns first tokens, last tokens and scores, each B count; missing spans score minus infinity.
    """
    minus_inf = float("-inf")
    first = start.masked_fill(~allowed, minus_inf)
    last = functional.pad(end.masked_fill(~allowed, minus_inf), (0, longest - 1), value=minus_inf).unfold(
        1, longest, 1
    )  # B T L
    scores, places = (first[:, :, None] + last).flatten(1).topk(min(count, start.shape[1] * longest), dim=1)
    starts = places // longest
    return starts, starts + places % longest, scores


@torch.no_grad()
def predict(
    engine: Engine, table: Table, questions: Questions, *, n_best: int = N_BEST, longest: int = LONGEST
) -> list[Reading]:
    """Return a reading for each question of `questions.asked`, the same on every rank. Restores the model's mode.

    Every rank runs the same number of forwards, all of one shape. Raises RunError if scores are not finite.
    """
    total, ranks = len(questions.owner), engine.ranks
    size = engine.micro_batch or max(1, engine.recipe.train.global_batch // ranks.size)
    results = torch.zeros(total, 3 * n_best + 1, device=engine.device)
    was_training = engine.bare.training
    engine.bare.eval()
    for begin in range(0, total, size * ranks.size):
        mine = begin + ranks.world.rank * size + np.arange(size)
        kept = int((mine < total).sum())
        rows = np.minimum(mine, total - 1)  # rows past the end are padding
        host_batch = table.rows(mine)
        batch = to_device({name: host_batch[name] for name in INPUTS}, engine.device)
        allowed = torch.from_numpy(questions.offsets[rows, :, 1] >= 0).to(engine.device)
        with engine.eval_context():
            start, end = span_scores(engine.bare, batch)
        parts = [*best_spans(start, end, allowed, longest, n_best), (start[:, :1] + end[:, :1])]
        columns = torch.cat([_pad_columns(part, n_best) for part in parts], 1)
        results[torch.from_numpy(rows[:kept]).to(engine.device)] = columns[:kept]
    engine.bare.train(was_training)
    values = ranks.sum(results).cpu().numpy().astype(np.float64)
    return _merge_windows(values, questions, n_best)


def _pad_columns(part: Tensor, n_best: int) -> Tensor:
    """Return `part` in float32, padded with minus infinity to `n_best` columns; a single column is left as is."""
    missing = 0 if part.shape[1] == 1 else n_best - part.shape[1]
    return functional.pad(part.float(), (0, missing), value=float("-inf"))


def _merge_windows(values: np.ndarray, questions: Questions, n_best: int) -> list[Reading]:
    """Merge the windows of each question into spans of the original context."""
    bounds = np.searchsorted(questions.owner, np.arange(len(questions.asked) + 1))
    readings = []
    for number, question in enumerate(questions.asked):
        rows = np.arange(bounds[number], bounds[number + 1])
        firsts, lasts, scores = (values[rows, part * n_best : (part + 1) * n_best].ravel() for part in range(3))
        windows_of = np.repeat(rows, n_best)
        null = float(values[rows, -1].min())
        spans: dict[str, Span] = {}
        for index in np.argsort(-scores, kind="stable"):
            if len(spans) == n_best or not scores[index] > -math.inf:
                break
            offsets = questions.offsets[windows_of[index]]
            begin, end = int(offsets[int(firsts[index]), 0]), int(offsets[int(lasts[index]), 1])
            piece = question.context[begin:end]
            text = piece.strip()
            if text and text not in spans:
                spans[text] = Span(text, float(scores[index]), begin + len(piece) - len(piece.lstrip()))
        if not spans or not math.isfinite(null + next(iter(spans.values())).score):
            raise RunError(f"{question.where or question.id}: the model's scores are not finite")
        readings.append(Reading(tuple(spans.values()), null))
    return readings


def ask(
    engine: Engine, reader: Reader, pairs: Sequence[tuple[str, str]], length: int = 384, stride: int = 128
) -> list[Reading]:
    """Answer each `(question, context)`. Raises DataError for a question that leaves no room for context."""
    questions = tuple(
        Question(str(number), text, context, where=f"pair {number}") for number, (text, context) in enumerate(pairs)
    )
    arrays = windows(questions, reader, length, stride)
    table = Table({name: arrays[name] for name in TRAINED}, "asked", PADDING)
    return predict(engine, table, Questions(questions, arrays["owner"], arrays["offsets"]))


# Metrics.


def normalized(text: str) -> str:
    """Return the text in lower case, without ASCII punctuation and the articles a, an, the, with single spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """Return 1 if the normalized prediction equals one of the answers; without answers, if it is empty."""
    return float(normalized(prediction) in _golden(answers))


def f1_score(prediction: str, answers: Iterable[str]) -> float:
    """Return the best F1 over normalized words of any answer; without answers, 1 if the prediction has no words."""
    return max(_overlap(normalized(prediction).split(), answer.split()) for answer in _golden(answers))


def _golden(answers: Iterable[str]) -> list[str]:
    """Return the nonempty normalized answers, or one empty answer."""
    return [text for text in map(normalized, answers) if text] or [""]


def _overlap(words: list[str], golden: list[str]) -> float:
    if not words or not golden:
        return float(words == golden)
    shared = sum((Counter(words) & Counter(golden)).values())
    return 2 * shared / (len(words) + len(golden))


def best_threshold(scores: Sequence[float], odds: Sequence[float], has_answer: Sequence[bool]) -> tuple[float, float]:
    """Return the best mean score in percent over all no-answer thresholds, and that threshold.

    `scores` are those of answering every question; a question with odds above the threshold counts as unanswered.
    """
    order = sorted(range(len(odds)), key=lambda index: odds[index])
    reached = float(sum(not has for has in has_answer))
    best, threshold = reached, odds[order[0]] - 1.0
    for number, index in enumerate(order):
        reached += scores[index] if has_answer[index] else -1.0
        # No threshold separates questions with equal odds.
        tied = number + 1 < len(order) and odds[order[number + 1]] == odds[index]
        if reached > best and not tied:
            best, threshold = reached, odds[index]
    return 100.0 * best / len(odds), threshold


def figures(questions: Sequence[Question], readings: Sequence[Reading], threshold: float | None) -> dict[str, float]:
    """Return the official metrics, in percent: `exact`, `f1`, and the count `total`.

    With unanswerable questions also those of each class, prefixed `HasAns_` and `NoAns_`, and the best over all thresholds:
    `best_exact`, `best_f1`, `best_exact_thresh`, `best_f1_thresh`.
    """
    has_answer = [bool(question.answers) for question in questions]
    texts = [[answer.text for answer in question.answers] for question in questions]
    out: dict[str, float] = {}
    for name, score in (("exact", exact_match), ("f1", f1_score)):
        values = np.array([score(reading.text(threshold), text) for reading, text in zip(readings, texts, strict=True)])
        out[name] = 100.0 * float(values.mean())
        for prefix, present in (("HasAns", np.array(has_answer)), ("NoAns", ~np.array(has_answer))):
            if present.any() and not all(has_answer):
                out[f"{prefix}_{name}"] = 100.0 * float(values[present].mean())
                out[f"{prefix}_total"] = int(present.sum())
        if not all(has_answer):
            raw = [score(reading.text(None), text) for reading, text in zip(readings, texts, strict=True)]
            best, odds = best_threshold(raw, [reading.null_odds for reading in readings], has_answer)
            out[f"best_{name}"], out[f"best_{name}_thresh"] = best, odds
    out["total"] = len(questions)
    return out


def evaluate(
    engine: Engine,
    table: Table,
    questions: Questions,
    *,
    threshold: float | None = None,
    out: Path | str | None = None,
    n_best: int = N_BEST,
    longest: int = LONGEST,
) -> dict[str, float]:
    """Return the metrics of a split, the same on every rank, and write predictions to the folder `out`. Early stopping uses `f1`.

    A question with `null_odds` above `threshold` is unanswered. None: 0 if the split has unanswerable questions (SQuAD 2.0), else
    every question is answered (SQuAD 1.1).
    """
    readings = predict(engine, table, questions, n_best=n_best, longest=longest)
    if threshold is None and questions.unanswerable:
        threshold = 0.0
    if out is not None and engine.ranks.first:
        write_predictions(Path(out), questions.asked, readings, threshold)
    return figures(questions.asked, readings, threshold)


def write_predictions(
    folder: Path, questions: Sequence[Question], readings: Sequence[Reading], threshold: float | None
) -> None:
    """Write `predictions.json` (id -> text, for the official script), `nbest_predictions.json` and `null_odds.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(question.id, reading) for question, reading in zip(questions, readings, strict=True)]
    write_json(folder / "predictions.json", {id: reading.text(threshold) for id, reading in pairs})
    write_json(folder / "nbest_predictions.json", {id: _n_best(reading, threshold) for id, reading in pairs})
    write_json(folder / "null_odds.json", {id: reading.null_odds for id, reading in pairs})


def _n_best(reading: Reading, threshold: float | None) -> list[dict[str, object]]:
    """Return a reading's answers with softmax probabilities; with a threshold, no answer is one of them."""
    rows = [(span.text, span.score, span.start) for span in reading.spans]
    if threshold is not None:
        rows = sorted([*rows, ("", reading.null, -1)], key=lambda row: -row[1])
    odds = [math.exp(score - rows[0][1]) for _, score, _ in rows]
    return [
        {"text": text, "probability": odd / sum(odds), "score": score, "start": start}
        for (text, score, start), odd in zip(rows, odds, strict=True)
    ]
