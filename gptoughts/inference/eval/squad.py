"""SQuAD's own figures: exact match and F1 of answers read from the context, for questions with and without an answer.

The definitions are those of the official script of SQuAD 2.0 (Rajpurkar, Jia and Liang 2018), which gives what SQuAD 1.1's gives where
every question has an answer. Spans are searched exhaustively, not among the best few starts and ends.
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
from gptoughts.data.squad.examples import PADDING, TRAINED, Question, Questions
from gptoughts.data.squad.windows import Reader, windows
from gptoughts.data.table import Table
from gptoughts.data.text.writer import write_json
from gptoughts.engine.engine import Engine
from gptoughts.engine.objectives.span_qa import span_scores
from gptoughts.errors import RunError

N_BEST = 20
LONGEST = 30
"""Tokens of the longest answer."""
READ = ("input_ids", "token_types", "mask")
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
Score = Callable[[str, Iterable[str]], float]


@dataclass(frozen=True)
class Span:
    """A piece of the context and its score: the sum of its first and last token's."""

    text: str
    score: float
    start: int
    """Its first character."""


@dataclass(frozen=True)
class Reading:
    """What the model says to one question."""

    spans: tuple[Span, ...]
    """The best, of different texts, best first; at least one."""
    null: float
    """Score of no answer: [CLS] as both ends, the least of all windows."""

    @property
    def null_odds(self) -> float:
        """How far no answer is ahead of the best one."""
        return self.null - self.spans[0].score

    def text(self, threshold: float | None) -> str:
        """The answer; nothing where no answer is ahead by more than `threshold`. None always answers."""
        return "" if threshold is not None and self.null_odds > threshold else self.spans[0].text


# Reading.


def best_spans(start: Tensor, end: Tensor, allowed: Tensor, longest: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` best spans of at most `longest` tokens, from first to last within `allowed` tokens, of each row.

    `start`, `end`, `allowed` are B T. Returns first tokens, last tokens and scores, each B count; a span that is not there scores
    minus infinity.
    """
    nothing = float("-inf")
    first = start.masked_fill(~allowed, nothing)
    last = functional.pad(end.masked_fill(~allowed, nothing), (0, longest - 1), value=nothing).unfold(1, longest, 1)  # B T L
    scores, places = (first[:, :, None] + last).flatten(1).topk(min(count, start.shape[1] * longest), dim=1)
    starts = places // longest
    return starts, starts + places % longest, scores


@torch.no_grad()
def predict(
    engine: Engine, table: Table, questions: Questions, *, n_best: int = N_BEST, longest: int = LONGEST
) -> list[Reading]:
    """A reading for each question of `questions.asked`, the same on every rank. Leaves the model in the mode it was in.

    Every rank makes the same number of forwards, all of one shape. Raises RunError where scores are not finite.
    """
    total, ranks = len(questions.owner), engine.ranks
    size = engine.micro_batch or max(1, engine.recipe.train.global_batch // ranks.size)
    found = torch.zeros(total, 3 * n_best + 1, device=engine.device)
    was_training = engine.bare.training
    engine.bare.eval()
    for begin in range(0, total, size * ranks.size):
        mine = begin + ranks.world.rank * size + np.arange(size)
        kept = int((mine < total).sum())
        rows = np.minimum(mine, total - 1)  # Rows past the end only fill up the batch.
        held = table.rows(mine)
        batch = to_device({name: held[name] for name in READ}, engine.device)
        allowed = torch.from_numpy(questions.offsets[rows, :, 1] >= 0).to(engine.device)
        with engine.eval_context():
            start, end = span_scores(engine.bare, batch)
        parts = [*best_spans(start, end, allowed, longest, n_best), (start[:, :1] + end[:, :1])]
        found[torch.from_numpy(rows[:kept]).to(engine.device)] = torch.cat([_wide(part, n_best) for part in parts], 1)[:kept]
    engine.bare.train(was_training)
    values = ranks.sum(found).cpu().numpy().astype(np.float64)
    return _merged(values, questions, n_best)


def _wide(part: Tensor, n_best: int) -> Tensor:
    """`part` in float32; filled up with minus infinity where a row has fewer spans than asked for."""
    missing = 0 if part.shape[1] == 1 else n_best - part.shape[1]
    return functional.pad(part.float(), (0, missing), value=float("-inf"))


def _merged(values: np.ndarray, questions: Questions, n_best: int) -> list[Reading]:
    """The windows of each question together, as texts of the original context."""
    bounds = np.searchsorted(questions.owner, np.arange(len(questions.asked) + 1))
    readings = []
    for number, question in enumerate(questions.asked):
        rows = np.arange(bounds[number], bounds[number + 1])
        firsts, lasts, scores = (values[rows, part * n_best : (part + 1) * n_best].ravel() for part in range(3))
        windows_of = np.repeat(rows, n_best)
        null = float(values[rows, -1].min())
        spans: dict[str, Span] = {}
        for place in np.argsort(-scores, kind="stable"):
            if len(spans) == n_best or not scores[place] > -math.inf:
                break
            offsets = questions.offsets[windows_of[place]]
            begin, end = int(offsets[int(firsts[place]), 0]), int(offsets[int(lasts[place]), 1])
            piece = question.context[begin:end]
            text = piece.strip()
            if text and text not in spans:
                spans[text] = Span(text, float(scores[place]), begin + len(piece) - len(piece.lstrip()))
        if not spans or not math.isfinite(null + next(iter(spans.values())).score):
            raise RunError(
                f"{question.where or question.id}: the model's scores are not finite; its weights or precision are broken"
            )
        readings.append(Reading(tuple(spans.values()), null))
    return readings


def ask(
    engine: Engine, reader: Reader, pairs: Sequence[tuple[str, str]], length: int = 384, stride: int = 128
) -> list[Reading]:
    """What the model says to each `(question, context)`. Raises DataError for a question that leaves the context no room."""
    asked = tuple(Question(str(number), text, context, where=f"pair {number}") for number, (text, context) in enumerate(pairs))
    held = windows(asked, reader, length, stride)
    table = Table({name: held[name] for name in TRAINED}, "asked", PADDING)
    return predict(engine, table, Questions(asked, held["owner"], held["offsets"]))


# Figures.


def normalized(text: str) -> str:
    """Lower case, without ASCII punctuation, the articles a, an, the, and more than single spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1 where the prediction is one of the answers, both normalized; without answers, where it is empty."""
    return float(normalized(prediction) in _golden(answers))


def f1_score(prediction: str, answers: Iterable[str]) -> float:
    """The best harmonic mean of precision and recall over normalized words; without answers, 1 where the prediction has no word."""
    return max(_overlap(normalized(prediction).split(), answer.split()) for answer in _golden(answers))


def _golden(answers: Iterable[str]) -> list[str]:
    """Normalized answers; the empty one where there is none, or nothing is left of them."""
    return [text for text in map(normalized, answers) if text] or [""]


def _overlap(words: list[str], golden: list[str]) -> float:
    if not words or not golden:
        return float(words == golden)
    shared = sum((Counter(words) & Counter(golden)).values())
    return 2 * shared / (len(words) + len(golden))


def best_threshold(scores: Sequence[float], odds: Sequence[float], has_answer: Sequence[bool]) -> tuple[float, float]:
    """The best mean score in percent that a no-answer threshold reaches, and that threshold.

    `scores` are of the texts that were given to every question; a question whose odds lie above the threshold is left unanswered.
    """
    order = sorted(range(len(odds)), key=lambda place: odds[place])
    reached = float(sum(not has for has in has_answer))
    best, threshold = reached, odds[order[0]] - 1.0
    for number, place in enumerate(order):
        reached += scores[place] if has_answer[place] else -1.0
        # Questions of equal odds are answered together, whatever the threshold.
        tied = number + 1 < len(order) and odds[order[number + 1]] == odds[place]
        if reached > best and not tied:
            best, threshold = reached, odds[place]
    return 100.0 * best / len(odds), threshold


def figures(questions: Sequence[Question], readings: Sequence[Reading], threshold: float | None) -> dict[str, float]:
    """The official figures, in percent: `exact`, `f1` and `total`.

    Where some question has no answer also those of each class, with `HasAns_` and `NoAns_` before their names, and the best that a
    threshold reaches: `best_exact`, `best_f1`, `best_exact_thresh`, `best_f1_thresh`.
    """
    has_answer = [bool(question.answers) for question in questions]
    texts = [[answer.text for answer in question.answers] for question in questions]
    out: dict[str, float] = {}
    for name, score in (("exact", exact_match), ("f1", f1_score)):
        values = np.array([score(reading.text(threshold), text) for reading, text in zip(readings, texts, strict=True)])
        out[name] = 100.0 * float(values.mean())
        for word, present in (("HasAns", np.array(has_answer)), ("NoAns", ~np.array(has_answer))):
            if present.any() and not all(has_answer):
                out[f"{word}_{name}"] = 100.0 * float(values[present].mean())
                out[f"{word}_total"] = int(present.sum())
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
    """The figures of a split, the same on every rank; the one to stop on is `f1`. Predictions are written into the folder `out`.

    A question is left unanswered where no answer is ahead of the best one by more than `threshold`. None: 0 where some question of the
    split has no answer (SQuAD 2.0), and else every question is answered (SQuAD 1.1).
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
    """`predictions.json` (id -> text, which the official script reads), `nbest_predictions.json` and `null_odds.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(question.id, reading) for question, reading in zip(questions, readings, strict=True)]
    write_json(folder / "predictions.json", {id: reading.text(threshold) for id, reading in pairs})
    write_json(folder / "nbest_predictions.json", {id: _listed(reading, threshold) for id, reading in pairs})
    write_json(folder / "null_odds.json", {id: reading.null_odds for id, reading in pairs})


def _listed(reading: Reading, threshold: float | None) -> list[dict[str, object]]:
    """A reading's answers with their probabilities among each other; no answer is one of them where it is allowed."""
    rows = [(span.text, span.score, span.start) for span in reading.spans]
    if threshold is not None:
        rows = sorted([*rows, ("", reading.null, -1)], key=lambda row: -row[1])
    odds = [math.exp(score - rows[0][1]) for _, score, _ in rows]
    return [
        {"text": text, "probability": odd / sum(odds), "score": score, "start": start}
        for (text, score, start), odd in zip(rows, odds, strict=True)
    ]
