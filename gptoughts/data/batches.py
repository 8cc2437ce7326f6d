"""Batches in an order that depends only on seed, epoch and position, with a cursor for resuming in constant time.

Sample i of sequence length T covers tokens [i*T, i*T + T]; its labels are the T tokens after its first. So every token but
the stream's first is a label exactly once per epoch. Arrays are unshifted, as in Hugging Face: the objective shifts the labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptoughts.data.order import samples_at
from gptoughts.data.text.shards import Stream
from gptoughts.errors import DataError

IGNORED = -100
ORDER_CHUNK = 8192  # Number of samples whose order is computed at once.

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Cursor:
    """Position in the data order: `samples` consumed by all ranks since the start, and the fingerprint of the shards."""

    samples: int = 0
    fingerprint: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the cursor as plain values."""
        return {"samples": self.samples, "fingerprint": self.fingerprint}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Cursor:
        """Return the cursor that `to_json` wrote. Raises DataError for other values."""
        samples, fingerprint = values.get("samples"), values.get("fingerprint")
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 0 or not isinstance(fingerprint, str):
            raise DataError("data cursor: must have samples (at least 0) and fingerprint (a string)", found=dict(values))
        return Cursor(samples, fingerprint)


def samples_in(tokens: int, sequence_length: int) -> int:
    """Return the number of samples per epoch: windows of `sequence_length` labels, the last one padded."""
    return max(0, -(-(tokens - 1) // sequence_length))


def rank_rows(global_batch: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the first and end row of `rank` in a global batch. Raises DataError where `global_batch` is not divisible."""
    if not 0 <= rank < world_size:
        raise DataError(f"rank: must be from 0 to {world_size - 1} for {world_size} ranks", found=rank)
    if global_batch < 1 or global_batch % world_size:
        below, above = global_batch // world_size * world_size, (global_batch // world_size + 1) * world_size
        fix = f"--train.global-batch {below} or {above}" if below else f"--train.global-batch {above}"
        raise DataError(
            f"train.global_batch: must be a positive multiple of the ranks ({world_size})", found=global_batch, fix=fix
        )
    share = global_batch // world_size
    return rank * share, (rank + 1) * share


class Batches:
    """Endless iterable of `(batch, cursor)`: this rank's rows of each global batch, and the cursor to resume after it.

    A batch holds `input_ids` (rows, sequence_length + 1) in the shards' dtype and, only if something is padded, `labels`
    (int64, same shape, -100 where ignored). A global batch can span two epochs. `vocab_size` is the model's.

    Raises DataError for a batch not divisible by the ranks, fewer tokens than one global batch, an id outside the vocabulary, and
    a cursor of other shards.
    """

    def __init__(
        self,
        stream: Stream,
        sequence_length: int,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        cursor: Cursor | None = None,
        eot_id: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        check_stream(stream, sequence_length, vocab_size)
        self.first_row, self.end_row = rank_rows(global_batch, rank, world_size)
        needed = global_batch * sequence_length + 1
        if len(stream) < needed:
            raise DataError(
                f"split {stream.name!r} of {stream.folder}: shorter than one batch "
                f"({global_batch} x {sequence_length} + 1 = {needed:,} tokens)",
                found=f"{len(stream):,} tokens",
                fix="more text, or a smaller train.global_batch or data.sequence_length",
            )
        cursor = cursor or Cursor(0, stream.fingerprint)
        if cursor.fingerprint not in ("", stream.fingerprint):
            raise DataError(
                f"{stream.folder}: shards changed since the checkpoint (fingerprint {cursor.fingerprint[:12]})",
                found=stream.fingerprint[:12],
                fix="the data of the checkpoint, or a new run",
            )
        self.stream, self.sequence_length, self.global_batch, self.seed = stream, sequence_length, global_batch, seed
        self.eot_id = stream.eot_id if eot_id is None else eot_id
        self.cursor = Cursor(cursor.samples, stream.fingerprint)
        self.samples_per_epoch = samples_in(len(stream), sequence_length)

    def __iter__(self) -> Iterator[tuple[Batch, Cursor]]:
        """Iterate from the cursor given at construction; each call starts there again."""
        consumed, rows = self.cursor.samples, self.end_row - self.first_row
        ahead = max(1, min(ORDER_CHUNK // rows, self.samples_per_epoch // self.global_batch))
        while True:
            self.stream.check_files()
            samples = self.order(consumed, ahead)
            for batch_samples in samples:
                consumed += self.global_batch
                yield (
                    read_batch(self.stream, batch_samples, self.sequence_length, self.eot_id),
                    Cursor(consumed, self.cursor.fingerprint),
                )

    def order(self, consumed: int, batches: int) -> np.ndarray:
        """Return this rank's samples in the `batches` global batches after `consumed` samples: int64 (batches, rows)."""
        starts = consumed + np.arange(batches, dtype=np.int64)[:, None] * self.global_batch
        positions = starts + np.arange(self.first_row, self.end_row, dtype=np.int64)
        return samples_at(positions, self.samples_per_epoch, self.seed)


def read_batch(stream: Stream, samples: np.ndarray, sequence_length: int, eot_id: int) -> Batch:
    """Read the windows of `samples` as a batch; samples beyond the end of the split become rows of padding."""
    width = sequence_length + 1
    starts = samples * sequence_length
    # A window that starts on the last token has no label, so its row is empty.
    lengths = np.where(starts < len(stream) - 1, np.minimum(len(stream) - starts, width), 0)
    if lengths.min() == width:
        return {"input_ids": stream.gather(starts, width)}
    input_ids = np.full((len(samples), width), eot_id, dtype=stream.dtype)
    for row, start, length in zip(input_ids, starts.tolist(), lengths.tolist(), strict=True):
        row[:length] = stream.window(start, length) if length else []
    labels = input_ids.astype(np.int64)
    labels[np.arange(width) >= lengths[:, None]] = IGNORED
    return {"input_ids": input_ids, "labels": labels}


def eval_batches(
    stream: Stream,
    sequence_length: int,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    *,
    limit: int | None = None,
    eot_id: int | None = None,
    vocab_size: int | None = None,
) -> Iterator[Batch]:
    """Yield this rank's rows of the whole split in order, each sample once; shapes are constant, padding rows are ignored.

    `limit` selects that many global batches, spread evenly over the split. Every rank gets the same number of batches. Raises
    DataError as `Batches` does, but accepts a split shorter than one batch.
    """
    check_stream(stream, sequence_length, vocab_size)
    first, end = rank_rows(global_batch, rank, world_size)
    batches = -(-samples_in(len(stream), sequence_length) // global_batch)
    if not batches:
        raise DataError(f"split {stream.name!r} of {stream.folder}: needs at least 2 tokens", found=len(stream))
    padding = stream.eot_id if eot_id is None else eot_id
    rows = np.arange(first, end, dtype=np.int64)
    count = batches if limit is None else min(limit, batches)
    # Spread over the split, because the first batches hold only its first documents.
    numbers = (index * batches // count for index in range(count))
    return (read_batch(stream, number * global_batch + rows, sequence_length, padding) for number in numbers)


def check_stream(stream: Stream, sequence_length: int, vocab_size: int | None) -> None:
    """Raise DataError for a length below 1, or a token id not below the model's `vocab_size`."""
    if sequence_length < 1:
        raise DataError("data.sequence_length: must be at least 1", found=sequence_length)
    if vocab_size is not None and stream.max_id >= vocab_size:
        raise DataError(
            f"split {stream.name!r} of {stream.folder}: token id outside the model's vocabulary of {vocab_size}",
            found=stream.max_id,
            fix=f"model.vocab_size at least {stream.vocab_size}, or unset",
        )
