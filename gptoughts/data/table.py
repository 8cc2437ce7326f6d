"""A corpus of rows of fixed length: conversations, or questions about contexts. Order and cursor are those of the token stream.

On disk a table is a folder: one `.npy` for each array and `index.json`, which is written last.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptoughts.data.batches import IGNORED, ORDER_CHUNK, Batch, Cursor, rank_rows
from gptoughts.data.order import permuted
from gptoughts.data.text.shards import INDEX, sha256_of
from gptoughts.data.text.writer import sync, sync_folder, write_json
from gptoughts.errors import DataError

FORMAT, VERSION = "gptoughts-table", 1
PLAIN_KINDS = "biuf"  # Booleans, integers and floats: what a file can hold without a pickle.


class Table:
    """Rows that a run reads. `arrays` have the same first dimension, which `len` gives; `fingerprint` is what a cursor belongs to.

    `padding` says what makes a row not count: a row that only fills up a batch is a copy of the first one, so that its ids and
    masks are sound, with these keys overwritten; by default labels are -100. Arrays stored as int32 are given as int64.
    `facts` are plain values about the table that travel with it.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        fingerprint: str,
        padding: Mapping[str, int] | None = None,
        facts: Mapping[str, Any] | None = None,
        origin: str = "the table",
    ) -> None:
        self.arrays, self.fingerprint, self.origin = dict(arrays), fingerprint, origin
        self.padding = {"labels": IGNORED} if padding is None else dict(padding)
        self.facts = dict(facts or {})
        lengths = {name: array.shape[0] if array.ndim else 0 for name, array in self.arrays.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"{origin}: arrays need one number of rows, here: {lengths or 'no array'}")
        unknown = self.padding.keys() - self.arrays.keys()
        if unknown or not self.padding:
            raise DataError(
                f"{origin}: padding names {', '.join(sorted(unknown)) or 'no array'}; it must say what makes a row not count, "
                f"and the arrays are {', '.join(self.arrays)}"
            )
        odd = [name for name, array in self.arrays.items() if array.dtype.kind not in PLAIN_KINDS]
        if odd:
            raise DataError(f"{origin}: array {odd[0]!r} holds {self.arrays[odd[0]].dtype}, not numbers")

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def rows(self, samples: np.ndarray) -> Batch:
        """The rows `samples` (int64, any order) as a fresh batch; samples at or beyond the end are rows that do not count."""
        real = samples < len(self)
        chosen = np.where(real, samples, 0)
        batch = {name: widened(array[chosen]) for name, array in self.arrays.items()}
        if not real.all():
            for name, value in self.padding.items():
                batch[name][~real] = value
        return batch

    def batches(
        self, global_batch: int, seed: int, rank: int = 0, world_size: int = 1, cursor: Cursor | None = None
    ) -> Iterator[tuple[Batch, Cursor]]:
        """Endless `(batch, cursor)`: this rank's rows of each global batch, and the cursor to resume from after it.

        Every row is read exactly once an epoch; a global batch may lie across two. The cursor tells where in the endless stream
        the batch's samples stand: `positions(cursor, ...)`. Raises DataError for a batch that ranks cannot share, fewer rows than
        one global batch, and a cursor of another table.
        """
        first, end = rank_rows(global_batch, rank, world_size)
        if len(self) < global_batch:
            raise DataError(
                f"{self.origin} has {len(self):,} rows, fewer than train.global_batch {global_batch}; "
                f"give more data, or type --train.global-batch {max(1, len(self))}"
            )
        if cursor is not None and cursor.fingerprint not in ("", self.fingerprint):
            raise DataError(
                f"{self.origin}: data or its settings changed since the checkpoint (fingerprint {self.fingerprint[:12]}, "
                f"checkpoint {cursor.fingerprint[:12]}); give the data it was trained on, or start a new run"
            )
        return self._endless(first, end, global_batch, seed, cursor.samples if cursor else 0)

    def _endless(self, first: int, end: int, global_batch: int, seed: int, consumed: int) -> Iterator[tuple[Batch, Cursor]]:
        # No more than an epoch: each epoch has an order of its own, which costs the same for few rows as for many.
        ahead = max(1, min(ORDER_CHUNK // (end - first), len(self) // global_batch))
        while True:
            starts = consumed + np.arange(ahead, dtype=np.int64)[:, None] * global_batch
            for samples in self.order(starts + np.arange(first, end, dtype=np.int64), seed):
                consumed += global_batch
                yield self.rows(samples), Cursor(consumed, self.fingerprint)

    def order(self, positions: np.ndarray, seed: int) -> np.ndarray:
        """The rows that stand at `positions` of the endless stream of this seed: int64, in the same shape."""
        epochs, inside = np.divmod(positions, len(self))
        out = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            out[here] = permuted(inside[here], len(self), seed, epoch)
        return out

    def eval_batches(self, global_batch: int, rank: int = 0, world_size: int = 1, limit: int | None = None) -> Iterator[Batch]:
        """This rank's rows of the whole table in order, each once; shapes stay constant, rows that fill up do not count.

        `limit` takes that many global batches, spread evenly over the table. Every rank gets the same number of batches. Raises
        DataError for a batch that ranks cannot share, and for a table without rows.
        """
        first, end = rank_rows(global_batch, rank, world_size)
        if not len(self):
            raise DataError(f"{self.origin} has no rows to validate on")
        numbers = eval_numbers(len(self), global_batch, limit)
        rows = np.arange(first, end, dtype=np.int64)
        return (self.rows(number * global_batch + rows) for number in numbers)

    def save(self, folder: Path) -> None:
        """Writes the table into `folder`, which must not exist: all of it or nothing."""
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            entries = {name: write_array(temporary / f"{name}.npy", array) for name, array in self.arrays.items()}
            content = {"format": FORMAT, "version": VERSION, "rows": len(self), "fingerprint": self.fingerprint}
            content |= {"padding": self.padding, "facts": self.facts, "arrays": entries}
            write_json(temporary / INDEX, content)
            os.rename(temporary, folder)
            sync_folder(folder.parent)
        except OSError as error:
            raise DataError(f"{error.filename or folder}: cannot be written ({error.strerror or error})") from None

    @staticmethod
    def load(folder: Path) -> Table:
        """The table that `save` wrote, memory-mapped, once every file's size and sha256 is that of the index. Raises DataError."""
        path = folder / INDEX
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] != FORMAT or raw["version"] != VERSION:
                raise DataError(f"{path}: format {raw['format']!r} version {raw['version']}, not {FORMAT!r} version {VERSION}")
            arrays = {name: open_array(folder, name, entry, raw["rows"]) for name, entry in raw["arrays"].items()}
            return Table(arrays, raw["fingerprint"], raw["padding"], raw["facts"], str(folder))
        except FileNotFoundError as error:
            raise DataError(f"{error.filename}: no such file; {AGAIN.format(folder)}") from None
        except OSError as error:
            raise DataError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: damaged ({type(error).__name__}: {error}); {AGAIN.format(folder)}") from None


AGAIN = "remove the folder {} and it is made again"


def positions(cursor: Cursor, global_batch: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
    """Where the rows of the training batch that came with `cursor` stand in the endless stream of samples: int64 (rows,)."""
    first, end = rank_rows(global_batch, rank, world_size)
    return cursor.samples - global_batch + np.arange(first, end, dtype=np.int64)


def eval_numbers(rows: int, global_batch: int, limit: int | None) -> list[int]:
    """The global batches that an evaluation reads, spread over the whole: its first ones alone would be its first rows."""
    batches = -(-rows // global_batch)
    taken = batches if limit is None else min(limit, batches)
    return [index * batches // taken for index in range(taken)]


def widened(array: np.ndarray) -> np.ndarray:
    """int32 as int64, which is what losses and embeddings take; anything else as it is."""
    return array.astype(np.int64) if array.dtype == np.int32 else array


def write_array(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Writes one array, synced, and returns its entry for the index."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    with path.open("wb") as file:
        np.save(file, little, allow_pickle=False)
        sync(file)
    shape = list(array.shape)
    return {"dtype": array.dtype.name, "shape": shape, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def open_array(folder: Path, name: str, entry: Mapping[str, Any], rows: int) -> np.ndarray:
    """One array as a read-only map. Raises DataError that names a file which is not what the index says."""
    if Path(name).name != name:
        raise DataError(f"{folder / INDEX}: array {name!r} is not a plain file name")
    path = folder / f"{name}.npy"
    size = path.stat().st_size
    if size != entry["bytes"]:
        what = "truncated" if size < entry["bytes"] else "longer than it was"
        raise DataError(f"{path}: {what} ({size} bytes, {entry['bytes']} expected); {AGAIN.format(folder)}")
    if sha256_of(path) != entry["sha256"]:
        raise DataError(f"{path}: changed since it was written (another sha256 than in {INDEX}); {AGAIN.format(folder)}")
    # An empty array cannot be mapped.
    array = np.load(path, mmap_mode="r" if rows else None, allow_pickle=False)
    if array.dtype.name != entry["dtype"] or list(array.shape) != entry["shape"] or not array.ndim or len(array) != rows:
        raise DataError(
            f"{path}: {array.dtype} {list(array.shape)}, {INDEX} says {entry['dtype']} {entry['shape']}, {rows} rows"
        )
    return array.view(np.ndarray)  # np.memmap's own slicing costs twice the time.
