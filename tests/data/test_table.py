"""Every row once an epoch, for every rank and after every resume; what lies on the disk is what was written, or an error."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoughts.data.batches import IGNORED, Cursor
from gptoughts.data.table import Table, positions
from gptoughts.errors import DataError


def table_of(rows: int, width: int = 3, fingerprint: str = "f") -> Table:
    """Row i holds i in its ids and labels."""
    ids = np.repeat(np.arange(rows, dtype=np.uint16)[:, None], width, axis=1)
    return Table({"input_ids": ids, "labels": ids.astype(np.int32), "mask": np.ones((rows, width), bool)}, fingerprint)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 90), batch=st.integers(1, 8), ranks=st.integers(1, 4), seed=st.integers(0, 2**70))
def test_every_row_once_an_epoch_over_all_ranks(rows: int, batch: int, ranks: int, seed: int) -> None:
    table, whole = table_of(rows), batch * ranks
    if rows < whole:
        with pytest.raises(DataError, match=r"fewer rows than train\.global_batch"):
            table.batches(whole, seed)
        return
    streams = [islice(table.batches(whole, seed, rank, ranks), rows) for rank in range(ranks)]
    seen: list[int] = []
    for parts in zip(*streams, strict=True):
        assert len({cursor for _, cursor in parts}) == 1
        for one, _ in parts:
            assert one["input_ids"].dtype == np.uint16 and one["labels"].dtype == np.int64
            seen += one["input_ids"][:, 0].tolist()
    epochs = [sorted(seen[start : start + rows]) for start in range(0, len(seen), rows)]
    assert len(epochs) == whole and all(epoch == list(range(rows)) for epoch in epochs)
    if rows > 20:
        assert seen[:rows] != seen[rows : 2 * rows] or whole == 1


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(8, 60), cut=st.integers(0, 40), seed=st.integers(0, 99), ranks=st.sampled_from([1, 2, 4]))
def test_resuming_goes_on_with_any_number_of_ranks(rows: int, cut: int, seed: int, ranks: int) -> None:
    table = table_of(rows)
    unbroken = [one["input_ids"][:, 0].tolist() for one, _ in islice(table.batches(8, seed), cut + 3)][cut:]
    start = Cursor(cut * 8, "f")
    again = [islice(table.batches(8, seed, rank, ranks, start), 3) for rank in range(ranks)]
    for expected, parts in zip(unbroken, zip(*again, strict=True), strict=True):
        assert [row for one, _ in parts for row in one["input_ids"][:, 0].tolist()] == expected


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 60), batch=st.integers(1, 6), ranks=st.integers(1, 3), limit=st.none() | st.integers(1, 9))
def test_evaluation_counts_each_row_once(rows: int, batch: int, ranks: int, limit: int | None) -> None:
    table, whole = table_of(rows), batch * ranks
    read = [list(table.eval_batches(whole, rank, ranks, limit)) for rank in range(ranks)]
    assert len({len(one) for one in read}) == 1
    counted: list[int] = []
    for one in (one for batches in read for one in batches):
        assert one["input_ids"].shape == (batch, 3) and one["labels"].shape == (batch, 3) and one["mask"].all()
        counted += one["labels"][one["labels"] != IGNORED].tolist()[::3]
    if limit is None:
        assert sorted(counted) == list(range(rows))
    else:
        assert len(counted) == len(set(counted)) and len(read[0]) == min(limit, -(-rows // whole))


def test_a_limited_evaluation_is_spread_over_the_table() -> None:
    first = [one["input_ids"][0, 0] for one in table_of(100).eval_batches(10, limit=5)]
    assert first == [0, 20, 40, 60, 80]


def test_positions_tell_where_a_batch_stands_whatever_the_ranks() -> None:
    table = table_of(20)
    for rank in range(2):
        for number, (batch, cursor) in enumerate(islice(table.batches(6, 3, rank, 2), 9)):
            place = positions(cursor, 6, rank, 2)
            assert place.tolist() == [number * 6 + rank * 3 + row for row in range(3)]
            assert table.order(place, 3).tolist() == batch["input_ids"][:, 0].tolist()


def test_errors_name_what_to_mend() -> None:
    with pytest.raises(
        DataError, match=r"must be a positive multiple of the ranks \(3\)(.|\n)*Try: --train.global-batch 6 or 9"
    ):
        table_of(20).batches(8, 0, 0, 3)
    with pytest.raises(DataError, match=r"changed since the checkpoint\. Found fingerprint f, checkpoint another\."):
        table_of(20).batches(2, 0, cursor=Cursor(4, "another"))
    with pytest.raises(DataError, match=r"fewer rows than train\.global_batch 4\. Found 3\.\n  Try: --train\.global-batch 3,"):
        table_of(3).batches(4, 0)
    with pytest.raises(DataError, match="no rows to validate on"):
        table_of(0).eval_batches(4)
    with pytest.raises(DataError, match=r"differ in their number of rows\. Found {'a': 3, 'labels': 4}"):
        Table({"a": np.zeros(3), "labels": np.zeros(4)}, "f")
    with pytest.raises(DataError, match=r"padding must name arrays of the table \(a\)\. Found labels"):
        Table({"a": np.zeros(3)}, "f")
    with pytest.raises(DataError, match=r"'labels' is not numeric\. Found dtype object"):
        Table({"labels": np.array([None, 1])}, "f")


def test_other_keys_can_make_a_row_not_count() -> None:
    table = Table({"starts": np.arange(3), "ends": np.arange(3)}, "f", {"starts": -100, "ends": -1})
    last = list(table.eval_batches(2))[-1]
    assert last["starts"].tolist() == [2, -100] and last["ends"].tolist() == [2, -1]


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(0, 30), width=st.integers(1, 5))
def test_a_saved_table_comes_back(tmp_path_factory: pytest.TempPathFactory, rows: int, width: int) -> None:
    folder = tmp_path_factory.mktemp("t") / "train"
    table = Table(table_of(rows, width).arrays, "f", stats={"fill": 0.5})
    table.save(folder)
    again = Table.load(folder)
    assert again.fingerprint == "f" and again.padding == {"labels": -100} and again.stats == {"fill": 0.5}
    for name, array in table.arrays.items():
        assert again.arrays[name].dtype == array.dtype and (again.arrays[name] == array).all()
    assert not list(folder.parent.glob("*.tmp"))
    if rows:
        batch, _ = next(again.batches(1, 0))
        assert batch["labels"].flags.writeable


def test_damage_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        table_of(9).save(tmp_path / name)
        return tmp_path / name

    folder = fresh("truncated")
    (folder / "labels.npy").write_bytes((folder / "labels.npy").read_bytes()[:-1])
    with pytest.raises(
        DataError, match=r"labels.npy: truncated, expected \d+ bytes\. Found \d+\.\n  Try: rm -r \S+truncated; it is rebuilt"
    ):
        Table.load(folder)
    folder = fresh("flipped")
    raw = bytearray((folder / "input_ids.npy").read_bytes())
    raw[-1] ^= 1
    (folder / "input_ids.npy").write_bytes(raw)
    with pytest.raises(DataError, match=r"input_ids.npy: changed since"):
        Table.load(folder)
    folder = fresh("missing")
    (folder / "mask.npy").unlink()
    with pytest.raises(DataError, match=r"mask.npy: missing, or not a file"):
        Table.load(folder)
    for content in ("", "[]", "{}", '{"format": "gptoughts-table", "version": 1, "rows": "x", "arrays": 3}'):
        (folder / "index.json").write_text(content)
        with pytest.raises(DataError, match=r"index.json"):
            Table.load(folder)
    folder = fresh("outside")
    index = json.loads((folder / "index.json").read_text())
    index["arrays"] = {"../flipped/labels": index["arrays"]["labels"]}
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="plain file name"):
        Table.load(folder)
