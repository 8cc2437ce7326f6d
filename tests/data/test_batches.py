"""Every token is a label once an epoch; order, rank shares and resuming are pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gptoughts.data import batches as module
from gptoughts.data.batches import IGNORED, Batches, Cursor, eval_batches, samples_in
from gptoughts.data.order import permute
from gptoughts.data.text.shards import Index, Shard, Split, Stream
from gptoughts.errors import DataError

EOT = 60_000


@pytest.fixture(autouse=True, scope="module")
def short_chunks() -> Iterator[None]:
    """Streams here are small, so is the part of the order that is worth computing at once; some batches lie on its border."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ORDER_CHUNK", 64)
        yield


def stream_of(folder: Path, tokens: int, shard_tokens: int = 10**9) -> Stream:
    """A stream in which token i has the id i, so that a batch shows which tokens it took."""
    folder.mkdir(parents=True, exist_ok=True)
    row, shards = np.arange(tokens, dtype=np.uint16), []
    for number, start in enumerate(range(0, tokens, shard_tokens)):
        part = row[start : start + shard_tokens]
        np.save(folder / f"train_{number:06d}.npy", part)
        shards.append(Shard(f"train_{number:06d}.npy", len(part), 0, int(part.max()), "", "", ""))
    split = Split(tokens, 0, 0.0, tuple(shards))
    return Stream(folder, "train", Index("uint16", EOT + 1, EOT, {"hash": "x"}, {}, {}, {"train": split}))


def labeled(batch: dict[str, np.ndarray]) -> list[int]:
    """The labels that a loss sees: those after each row's first position, unless ignored."""
    labels = batch.get("labels", batch["input_ids"])
    return [int(label) for label in labels[:, 1:].ravel() if label != IGNORED]


lengths = {"tokens": st.integers(2, 400), "length": st.integers(1, 60), "batch": st.integers(1, 9)}


@settings(max_examples=80, deadline=None)
@given(**lengths, shard=st.integers(3, 500), seed=st.integers(0, 2**70))
def test_every_token_is_a_label_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, length: int, batch: int, shard: int, seed: int
) -> None:
    assume(tokens >= batch * length + 1)
    stream = stream_of(tmp_path_factory.mktemp("s"), tokens, shard)
    batches = Batches(stream, length, batch, seed)
    samples = batches.samples_per_epoch
    seen: list[int] = []
    # As many batches as make whole epochs: then each token was a label once in each of them.
    cursor = Cursor()
    for one, cursor in islice(batches, samples):  # noqa: B007
        assert one["input_ids"].shape == (batch, length + 1) and one["input_ids"].dtype == np.uint16
        if "labels" in one:
            kept = one["labels"] != IGNORED
            assert one["labels"].dtype == np.int64 and not kept.all()
            assert (one["labels"][kept] == one["input_ids"][kept]).all() and (one["input_ids"][~kept] == EOT).all()
        seen += labeled(one)
    assert cursor.samples == samples * batch
    assert sorted(seen) == sorted(list(range(1, tokens)) * batch)


@settings(max_examples=100, deadline=None)
@given(**lengths, ranks=st.integers(1, 4))
def test_evaluation_reads_everything_once(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, length: int, batch: int, ranks: int
) -> None:
    stream = stream_of(tmp_path_factory.mktemp("s"), tokens, 70)
    shares = [list(eval_batches(stream, length, batch * ranks, rank, ranks)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert all(one["input_ids"].shape == (batch, length + 1) for share in shares for one in share)
    assert sorted(label for share in shares for one in share for label in labeled(one)) == list(range(1, tokens))
    assert len(list(eval_batches(stream, length, batch * ranks, limit=1))) == 1


@settings(max_examples=200, deadline=None)
@given(count=st.integers(1, 5000), seed=st.integers(0, 2**130), epoch=st.integers(0, 2**40))
def test_the_order_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    order = permute(np.arange(count), count, seed, epoch)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(count))
    place = np.array([count // 2, count - 1, 0])
    assert permute(place, count, seed, epoch).tolist() == order[place].tolist()


def test_the_order_is_frozen_and_mixed() -> None:
    # Written down once: another platform or numpy that gives other numbers would break resuming.
    assert permute(np.arange(10), 10, 1337, 0).tolist() == FROZEN_10
    assert permute(np.array([0, 1, 10**11]), 10**12, 2**64 + 5, 3).tolist() == FROZEN_LARGE
    orders = {tuple(permute(np.arange(6), 6, seed, epoch).tolist()) for seed in range(200) for epoch in range(20)}
    assert len(orders) > 600  # Of 720.
    order = permute(np.arange(100_000), 100_000, 1, 0)
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.02
    assert (np.diff(order) == 1).mean() < 0.001


FROZEN_10 = [3, 6, 2, 7, 4, 1, 8, 0, 9, 5]
FROZEN_LARGE = [373784024208, 742600440965, 855868393358]


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(100, 900), length=st.integers(1, 20), share=st.integers(1, 3), ranks=st.integers(1, 4),
    start=st.integers(0, 10**6), seed=st.integers(0, 99),
)  # fmt: skip
def test_shares_of_the_ranks_are_the_batch_of_one(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, length: int, share: int, ranks: int, start: int, seed: int
) -> None:
    assume(tokens > share * ranks * length)
    stream, cursor = stream_of(tmp_path_factory.mktemp("s"), tokens, 200), Cursor(start)
    alone = islice(Batches(stream, length, share * ranks, seed, cursor=cursor), 6)
    together = zip(
        *(Batches(stream, length, share * ranks, seed, rank, ranks, cursor=cursor) for rank in range(ranks)), strict=True
    )
    for (one, after), parts in zip(alone, together, strict=False):
        assert np.concatenate([part["input_ids"] for part, _ in parts]).tolist() == one["input_ids"].tolist()
        assert {cursor for _, cursor in parts} == {after}
        assert sorted(label for part, _ in parts for label in labeled(part)) == sorted(labeled(one))


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(60, 500), walked=st.integers(0, 60), seed=st.integers(0, 99))
def test_seeking_equals_walking(tmp_path_factory: pytest.TempPathFactory, tokens: int, walked: int, seed: int) -> None:
    stream = stream_of(tmp_path_factory.mktemp("s"), tokens)
    cursor = Cursor(0, stream.fingerprint)
    batches = Batches(stream, 7, 5, seed)
    walk = iter(batches)
    for _, cursor in islice(walk, walked):  # noqa: B007
        pass
    assert cursor.samples == 5 * walked
    seek = Batches(stream, 7, 5, seed, cursor=Cursor.from_json(cursor.to_json()))
    for (left, a), (right, b) in islice(zip(walk, seek, strict=False), 8):
        assert a == b and left["input_ids"].tolist() == right["input_ids"].tolist()
    again = [one["input_ids"].tolist() for one, _ in islice(seek, 3)]
    assert again == [one["input_ids"].tolist() for one, _ in islice(seek, 3)]  # Iterating anew starts anew.


def test_a_batch_is_the_readers_own(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, 100)
    (one, _), (two, _) = islice(Batches(stream, 9, 2, 0), 2)
    before = two["input_ids"].copy()
    one["input_ids"][:] = 1
    assert (two["input_ids"] == before).all() and (stream.window(0, 100) == np.arange(100)).all()


def test_sample_counts() -> None:
    assert [samples_in(tokens, 4) for tokens in (0, 1, 2, 5, 6, 9)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"global_batch": 10, "world_size": 4},
            "train.global_batch: must be a positive multiple of the ranks (4). Found 10.\n  Try: --train.global-batch 8 or 12",
        ),
        ({"global_batch": 3, "world_size": 4}, "Found 3.\n  Try: --train.global-batch 4"),
        ({"global_batch": 0}, "must be a positive multiple of the ranks (1). Found 0.\n  Try: --train.global-batch 1"),
        ({"rank": 2, "world_size": 2}, "rank: must be from 0 to 1 for 2 ranks. Found 2"),
        ({"global_batch": 11}, "exactly enough"),
        (
            {"global_batch": 12},
            "shorter than one batch (12 x 9 + 1 = 109 tokens). Found 100 tokens.\n  Try: more text, or a smaller",
        ),
        ({"sequence_length": 0}, "data.sequence_length: must be at least 1. Found 0"),
        (
            {"vocab_size": 99},
            "token id outside the model's vocabulary of 99. Found 99.\n  Try: model.vocab_size at least 60001",
        ),
        ({"cursor": Cursor(5, "other")}, "shards changed since the checkpoint (fingerprint "),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, change: dict[str, object], message: str) -> None:
    stream = stream_of(tmp_path, 100)
    arguments: dict[str, object] = {"sequence_length": 9, "global_batch": 2, "seed": 1} | change
    if message == "exactly enough":
        Batches(stream, **arguments)  # type: ignore[arg-type]
        return
    with pytest.raises(DataError) as caught:
        Batches(stream, **arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_evaluation_needs_two_tokens(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"needs at least 2 tokens\. Found 1"):
        eval_batches(stream_of(tmp_path, 1), 4, 2)


@pytest.mark.parametrize(
    "values", [{}, {"samples": -1, "fingerprint": ""}, {"samples": True, "fingerprint": ""}, {"samples": 1}]
)
def test_a_cursor_that_is_none_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(
        DataError, match=r"data cursor: must have samples \(at least 0\) and fingerprint \(a string\)\. Found \{"
    ):
        Cursor.from_json(values)
