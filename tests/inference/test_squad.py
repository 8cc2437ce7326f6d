"""Exact match and F1 are the official ones, spans are the best there are, and a model that learns the questions answers them."""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptoughts.data.squad.question import Answer, Question
from gptoughts.data.squad.windows import Reader
from gptoughts.engine.engine import Engine
from gptoughts.engine.objectives.span_qa import QuestionAnswering, span_scores
from gptoughts.engine.trainer import train_step
from gptoughts.errors import DataError, RunError
from gptoughts.inference.eval.perplexity import mean_loss
from gptoughts.inference.eval.squad import (
    Reading,
    Span,
    ask,
    best_spans,
    best_threshold,
    evaluate,
    exact_match,
    f1_score,
    figures,
    normalized,
    predict,
)
from tests.data.squad.test_squad import bert_folder
from tests.engine.test_ddp import launch
from tests.support.squad_engines import BATCH, engine_for, main, write_questions

# The definition, told a second time.


def words_of(text: str) -> list[str]:
    """Lower case; signs of ASCII punctuation vanish; then a, an and the, where they stand alone, vanish; words are what is left."""
    kept = "".join(sign for sign in text.lower() if not (sign.isascii() and unicodedata.category(sign)[0] in "PS"))
    return re.split(r"\s+", re.sub(r"(?<!\w)(?:the|an|a)(?!\w)", " ", kept).strip()) if kept.strip() else []


def clean(words: list[str]) -> list[str]:
    return [word for word in words if word]


def said_exactly(prediction: str, answers: Sequence[str]) -> float:
    real = [clean(words_of(answer)) for answer in answers if clean(words_of(answer))]
    return 1.0 if any(clean(words_of(prediction)) == words for words in real or [[]]) else 0.0


def said_in_part(prediction: str, answers: Sequence[str]) -> float:
    best = 0.0
    for golden in [clean(words_of(answer)) for answer in answers if clean(words_of(answer))] or [[]]:
        mine, left, hits = clean(words_of(prediction)), list(golden), 0
        for word in mine:
            if word in left:
                left.remove(word)
                hits += 1
        if not mine or not golden:
            best = max(best, float(mine == golden))
        elif hits:
            precision, recall = hits / len(mine), hits / len(golden)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


CASES = [
    ("The Beatles!", ["beatles"], 1, 1),
    ("an  A-Team", ["the ateam"], 1, 1),
    ("Émile", ["Emile"], 0, 0),
    ("Émile", ["émile", "x"], 1, 1),
    ("in 1990", ["1990", "the year 1990"], 0, 2 / 3),
    ("cat cat", ["cat dog"], 0, 0.5),
    ("theatre", ["atre"], 0, 0),
    ("", [], 1, 1),
    ("x", [], 0, 0),
    ("the", [], 1, 1),
    ("", ["x"], 0, 0),
    ("x", ["the", "x"], 1, 1),
    ("!", ["the"], 1, 1),
    ("“quoted”", ["quoted"], 0, 0),
    ("北京", ["北京。"], 0, 0),
    ("$5 + 6", ["5 6"], 1, 1),
]


@pytest.mark.parametrize(("prediction", "answers", "exact", "f1"), CASES)
def test_scores_of_cases_reckoned_by_hand(prediction: str, answers: list[str], exact: float, f1: float) -> None:
    assert exact_match(prediction, answers) == said_exactly(prediction, answers) == exact
    assert f1_score(prediction, answers) == pytest.approx(f1)
    assert said_in_part(prediction, answers) == pytest.approx(f1)


SAYINGS = st.one_of(
    st.text(max_size=12),
    st.lists(
        st.sampled_from(["the", "a", "An", "cat", "Cat.", "dog", "-", "U.S.", "é", "ß", "a-b", "\u00a0", "thé"]), max_size=6
    ).map(" ".join),
)


@settings(max_examples=400, deadline=None)
@given(prediction=SAYINGS, answers=st.lists(SAYINGS, max_size=4))
@example(prediction="a_b", answers=["ab"])
@example(prediction="the\u0301 x", answers=["x"])
def test_scores_agree_with_a_second_implementation(prediction: str, answers: list[str]) -> None:
    assert normalized(prediction).split() == clean(words_of(prediction))
    assert exact_match(prediction, answers) == said_exactly(prediction, answers)
    assert f1_score(prediction, answers) == pytest.approx(said_in_part(prediction, answers))
    assert 0 <= exact_match(prediction, answers) <= f1_score(prediction, answers) <= 1
    assert not normalized(prediction) or f1_score(prediction, [prediction, *answers]) == 1


# Figures and thresholds.

READINGS = st.lists(
    st.tuples(SAYINGS.filter(str.strip), st.lists(SAYINGS.filter(str.strip), max_size=2), st.integers(-4, 4)),
    min_size=1,
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(rows=READINGS, threshold=st.none() | st.integers(-5, 5))
def test_figures_are_means_over_the_classes(rows: list[tuple[str, list[str], int]], threshold: int | None) -> None:
    questions = [
        Question(str(n), "q", "c", tuple(Answer(text, 0) for text in answers)) for n, (_, answers, _) in enumerate(rows)
    ]
    readings = [Reading((Span(text, 1.0, 0),), 1.0 + odds) for text, _, odds in rows]
    told = figures(questions, readings, threshold)
    for name, score in (("exact", said_exactly), ("f1", said_in_part)):
        each = [
            (bool(answers), score("" if threshold is not None and odds > threshold else text, answers))
            for text, answers, odds in rows
        ]
        assert told[name] == pytest.approx(100 * np.mean([value for _, value in each]))
        for word, has in (("HasAns", True), ("NoAns", False)):
            mine = [value for answerable, value in each if answerable is has]
            if all(answers for _, answers, _ in rows):
                assert f"{word}_{name}" not in told
                continue
            assert told.get(f"{word}_total", 0) == len(mine)
            assert not mine or told[f"{word}_{name}"] == pytest.approx(100 * np.mean(mine))
    assert told["total"] == len(rows)
    assert ("best_f1" in told) is any(not answers for _, answers, _ in rows)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-3, 3), st.booleans()), min_size=1, max_size=12))
def test_no_threshold_is_better_than_the_best(rows: list[tuple[float, int, bool]]) -> None:
    scores, odds, has = ([*column] for column in zip(*rows, strict=True))
    scores = [score if answerable else 0.0 for score, answerable in zip(scores, has, strict=True)]

    def reached(threshold: float) -> float:
        return 100 * float(np.mean([(float(not a) if o > threshold else s) for s, o, a in zip(scores, odds, has, strict=True)]))

    best, threshold = best_threshold(scores, odds, has)
    assert best == pytest.approx(reached(threshold)) == pytest.approx(max(reached(limit) for limit in np.arange(-5, 5, 0.5)))


# Spans.


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.integers(1, 12),
    longest=st.integers(1, 14),
    count=st.integers(1, 30),
    seed=st.integers(0, 999),
    share=st.floats(0.1, 1),
)
def test_the_best_spans_are_those_of_an_exhaustive_search(
    tokens: int, longest: int, count: int, seed: int, share: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    start, end = torch.randn(2, 3, tokens, generator=generator)
    allowed = torch.rand(3, tokens, generator=generator) < share
    starts, ends, scores = best_spans(start, end, allowed, longest, count)
    for row in range(3):
        every = {
            (i, j): float(start[row, i] + end[row, j])
            for i, j in itertools.product(range(tokens), repeat=2)
            if i <= j < i + longest and allowed[row, i] and allowed[row, j]
        }
        wanted = sorted(every.values(), reverse=True)[:count]
        kept = scores[row][scores[row] > -torch.inf]
        assert kept.tolist() == pytest.approx(wanted)
        for i, j, score in zip(starts[row].tolist(), ends[row].tolist(), kept.tolist(), strict=False):
            assert every[i, j] == pytest.approx(score)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("squad")
    write_questions(made, bert_folder)
    return made


def test_readings_are_the_best_over_all_windows_in_words_of_the_context(folder: Path) -> None:
    engine, tables, questions = engine_for(folder)
    engine.micro_batch = 5  # the last forward has rows that only fill up
    readings = predict(engine, tables["val"], questions["val"], n_best=4, longest=3)
    assert engine.bare.training
    held, asked = tables["val"], questions["val"]
    batch = {
        name: torch.from_numpy(np.array(held.rows(np.arange(len(held)))[name])).long()
        for name in ("input_ids", "token_types", "mask")
    }
    engine.bare.eval()
    with torch.no_grad():
        start, end = span_scores(engine.bare, batch)
    assert np.bincount(asked.owner).max() > 1, "some question has several windows"
    for number, question in enumerate(asked.asked):
        best: dict[str, float] = {}
        rows = np.flatnonzero(asked.owner == number)
        for row in rows:
            offsets = asked.offsets[row]
            context = np.flatnonzero(offsets[:, 1] >= 0)
            for i, j in itertools.product(context, repeat=2):
                if i <= j < i + 3:
                    text = question.context[offsets[i, 0] : offsets[j, 1]]
                    best[text] = max(best.get(text, -1e9), float(start[row, i] + end[row, j]))
        reading = readings[number]
        wanted = sorted(best.values(), reverse=True)
        assert reading.spans[0].score == pytest.approx(wanted[0], abs=1e-5)
        for span in reading.spans:
            assert best[span.text] == pytest.approx(span.score, abs=1e-5)
            assert question.context[span.start : span.start + len(span.text)] == span.text
        assert [span.score for span in reading.spans] == sorted((span.score for span in reading.spans), reverse=True)
        assert reading.null == pytest.approx(min(float(start[row, 0] + end[row, 0]) for row in rows), abs=1e-5)
        assert reading.null_odds == pytest.approx(reading.null - reading.spans[0].score)


@pytest.mark.slow
def test_two_ranks_are_told_what_one_is(folder: Path, tmp_path: Path) -> None:
    main(str(folder), str(tmp_path / "of1"))
    ran = launch(2, "-m", "tests.support.squad_engines", str(folder), str(tmp_path / "of2"))
    assert ran.returncode == 0, ran.stderr[-3000:]
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("of1-0", "of2-0", "of2-1"))
    assert first == second
    assert alone[0] == pytest.approx(first[0], abs=1e-4)
    for mine, theirs in zip(alone[1], first[1], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert sorted(path.name for path in tmp_path.glob("of2-files-*")) == ["of2-files-0"], "one rank writes"


def test_scores_that_are_not_finite_stop(folder: Path) -> None:
    engine, tables, questions = engine_for(folder)
    torch.nn.init.constant_(engine.bare.head.bias, float("nan"))  # type: ignore[union-attr, arg-type]
    with pytest.raises(RunError, match=r"question .*: the model's scores are not finite"):
        predict(engine, tables["val"], questions["val"])


# Learning.


def learned(folder: Path, steps: int, **data: Any) -> tuple[Engine, dict[str, Any], dict[str, Any]]:
    engine, tables, questions = engine_for(folder, **data)
    for _ in range(steps):
        train_step(engine, 3e-3)
    return engine, tables, questions


def test_a_model_that_has_learned_answers_and_says_where_it_cannot(folder: Path, tmp_path: Path) -> None:
    engine, tables, questions = learned(folder, 0)
    before = evaluate(engine, tables["train"], questions["train"])
    engine, tables, questions = learned(folder, 150)
    told = evaluate(engine, tables["train"], questions["train"], out=tmp_path)
    assert before["f1"] < 50 < 90 < told["f1"] <= told["best_f1"] + 1e-9
    assert told["HasAns_total"] == 2 * told["NoAns_total"]
    asked = questions["train"].asked
    saved, nbest, odds = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("predictions", "nbest_predictions", "null_odds")
    )
    assert list(saved) == list(nbest) == list(odds) == [question.id for question in asked]
    # The file alone, read by the second implementation, gives the figures.
    for name, score in (("exact", said_exactly), ("f1", said_in_part)):
        values = [score(saved[question.id], [answer.text for answer in question.answers]) for question in asked]
        assert told[name] == pytest.approx(100 * np.mean(values))
    for id, rows in nbest.items():
        assert sum(row["probability"] for row in rows) == pytest.approx(1)
        assert "" in [row["text"] for row in rows]
        assert (rows[0]["text"] == "") is (odds[id] > 0) is (saved[id] == "")
    always = evaluate(engine, tables["train"], questions["train"], threshold=1e9)
    never = evaluate(engine, tables["train"], questions["train"], threshold=-1e9)
    assert (always["NoAns_f1"], never["NoAns_f1"], never["HasAns_f1"]) == (0, 100, 0)
    reader = Reader.open(folder / "model")
    for pair in (("a?", asked[0].context), ("b?", asked[0].context)):
        (reading,) = ask(engine, reader, [pair], 32, 4)
        (question,) = (one for one in asked if (one.text, one.context) == pair)
        assert reading.text(None) == saved[question.id]
    with pytest.raises(DataError, match=r"pair 0: question too long for data.sequence_length 32"):
        ask(engine, reader, [("a" * 40, "b")], 32, 4)


def test_where_every_question_has_an_answer_one_is_always_given(tmp_path: Path) -> None:
    write_questions(tmp_path, bert_folder, unanswerable=False)
    engine, tables, questions = engine_for(tmp_path)
    told = evaluate(engine, tables["val"], questions["val"], out=tmp_path / "out")
    assert told.keys() == {"exact", "f1", "total"}
    assert all(json.loads((tmp_path / "out" / "predictions.json").read_text()).values())


# The objective.


def definition(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, int]:
    """Row by row, over the row's own tokens only."""
    total, rows = 0.0, 0
    logits = model(batch["input_ids"].long(), batch["token_types"].long(), batch["mask"]).double()
    for row in range(len(logits)):
        size = int(batch["mask"][row].sum())
        if batch["starts"][row] == -100:
            continue
        chances = torch.log_softmax(logits[row, :size], dim=0)
        total -= float(chances[batch["starts"][row], 0] + chances[batch["ends"][row], 1]) / 2
        rows += 1
    return total, rows


def test_the_loss_is_its_definition_and_adds_up_over_micro_batches(folder: Path) -> None:
    engine, tables, _ = engine_for(folder)
    objective = QuestionAnswering()
    held = tables["train"].rows(np.array([0, 3, 5, 10**6]))
    assert objective.prepare(held, np.arange(4)) is held
    batch = {name: torch.from_numpy(value) for name, value in held.items()}
    loss, weight = objective(engine.bare, batch), objective.weight(batch)
    with torch.no_grad():
        wanted, rows = definition(engine.bare, batch)
    assert loss.item() == pytest.approx(wanted, rel=1e-5) and float(weight) == rows == 3
    assert objective.tokens(batch) == 4 * 32
    loss.backward()
    whole = torch.cat([parameter.grad.flatten() for parameter in engine.parameters()])  # type: ignore[union-attr]
    assert whole.isfinite().all() and whole.abs().max() > 0
    engine.bare.zero_grad()
    for row in range(4):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        part = objective(engine.bare, one)
        assert row < 3 or part.item() == 0
        part.backward()
    parts = torch.cat([parameter.grad.flatten() for parameter in engine.parameters()])  # type: ignore[union-attr]
    assert (whole - parts).abs().max() < 1e-5
    loss, labels = mean_loss(engine, tables["val"].eval_batches(BATCH))
    assert loss > 0 and labels == len(tables["val"])


@pytest.mark.parametrize(("starts", "ends"), [(32, 32), (3, 2), (-1, 2), (-100, 2), (2, -100), (0, 31)])
def test_an_answer_outside_its_row_is_never_ignored(folder: Path, starts: int, ends: int) -> None:
    _, tables, _ = engine_for(folder)
    row = int(np.flatnonzero(tables["train"].arrays["mask"].sum(axis=1) < 32)[0])
    held = tables["train"].rows(np.array([0, row]))
    held["starts"][1], held["ends"][1] = starts, ends
    with pytest.raises(
        DataError, match=rf"sample 77: the answer is not inside its \d+ tokens. Found tokens {starts} to {ends}"
    ):
        QuestionAnswering().prepare(held, np.array([12, 77]))
