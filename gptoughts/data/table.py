"""Tables: rows of fixed length (conversations, SQuAD windows) with the same data order and cursor as the token stream.

On disk: a folder with one `.npy` per array and `index.json`, written last.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptoughts.data.batches import IGNORED, ORDER_CHUNK, Batch, Cursor, rank_rows
from gptoughts.data.order import samples_at
from gptoughts.data.text.shards import INDEX
from gptoughts.errors import DataError
from gptoughts.files import TEMPORARY, load_json, make_private, sha256_of, sync, sync_folder, write_json

FORMAT, VERSION = "gptoughts-table", 1
PLAIN_KINDS = "biuf"  # bool, int and float dtypes, which need no pickle


class Table:
    """Rows of fixed length as arrays with one first dimension.

    arrays       name -> array (rows, ...); int32 arrays are returned as int64
    fingerprint  identifies the content; a cursor is valid for one fingerprint
    padding      name -> value that excludes a row from the loss; padding rows are copies of row 0, so that their ids and masks
                 are valid, with these arrays overwritten. Default: labels -100
    stats        JSON values about the table, stored with it
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        fingerprint: str,
        padding: Mapping[str, int] | None = None,
        stats: Mapping[str, Any] | None = None,
        origin: str = "the table",
    ) -> None:
        self.arrays, self.fingerprint, self.origin = dict(arrays), fingerprint, origin
        self.padding = {"labels": IGNORED} if padding is None else dict(padding)
        self.stats = dict(stats or {})
        lengths = {name: array.shape[0] if array.ndim else 0 for name, array in self.arrays.items()}
        if len(set(lengths.values())) != 1:
            raise DataError(f"{origin}: arrays differ in their number of rows", found=lengths or "no array")
        unknown = self.padding.keys() - self.arrays.keys()
        if unknown or not self.padding:
            raise DataError(
                f"{origin}: padding must name arrays of the table ({', '.join(self.arrays)})",
                found=", ".join(sorted(unknown)) or "no array",
            )
        unsupported = [name for name, array in self.arrays.items() if array.dtype.kind not in PLAIN_KINDS]
        if unsupported:
            raise DataError(
                f"{origin}: array {unsupported[0]!r} is not numeric", found=f"dtype {self.arrays[unsupported[0]].dtype}"
            )

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def rows(self, samples: np.ndarray) -> Batch:
        """Return the rows `samples` (int64, any order) as a new batch; indices at or beyond the end become padding rows."""
        real = samples < len(self)
        indices = np.where(real, samples, 0)
        batch = {name: to_int64(array[indices]) for name, array in self.arrays.items()}
        if not real.all():
            for name, value in self.padding.items():
                batch[name][~real] = value
        return batch

    def batches(
        self, global_batch: int, seed: int, rank: int = 0, world_size: int = 1, cursor: Cursor | None = None
    ) -> Iterator[tuple[Batch, Cursor]]:
        """Yield `(batch, cursor)` without end: this rank's rows of each global batch, and the cursor to resume with after it.

        Each epoch reads every row exactly once; a global batch may span two epochs. `positions(cursor, ...)` gives the batch's
        sample positions. Raises DataError for a global batch not divisible by the ranks, fewer rows than one global batch, and
        a cursor of another table.
        """
        first, end = rank_rows(global_batch, rank, world_size)
        if len(self) < global_batch:
            raise DataError(
                f"{self.origin}: fewer rows than train.global_batch {global_batch}",
                found=f"{len(self):,}",
                fix=f"--train.global-batch {max(1, len(self))}, or more data",
            )
        if cursor is not None and cursor.fingerprint not in ("", self.fingerprint):
            raise DataError(
                f"{self.origin}: data or its settings changed since the checkpoint",
                found=f"fingerprint {self.fingerprint[:12]}, checkpoint {cursor.fingerprint[:12]}",
                fix="the data of the checkpoint, or a new run",
            )
        return self._endless(first, end, global_batch, seed, cursor.samples if cursor else 0)

    def _endless(self, first: int, end: int, global_batch: int, seed: int, consumed: int) -> Iterator[tuple[Batch, Cursor]]:
        # At most one epoch ahead: computing an epoch's order has a fixed cost per call.
        ahead = max(1, min(ORDER_CHUNK // (end - first), len(self) // global_batch))
        while True:
            starts = consumed + np.arange(ahead, dtype=np.int64)[:, None] * global_batch
            for samples in self.order(starts + np.arange(first, end, dtype=np.int64), seed):
                consumed += global_batch
                yield self.rows(samples), Cursor(consumed, self.fingerprint)

    def order(self, positions: np.ndarray, seed: int) -> np.ndarray:
        """Return the row index at each of `positions` in the sample stream of this seed: int64, same shape."""
        return samples_at(positions, len(self), seed)

    def eval_batches(self, global_batch: int, rank: int = 0, world_size: int = 1, limit: int | None = None) -> Iterator[Batch]:
        """Yield this rank's rows of the table in order, each once; constant shapes, padding rows excluded from the loss.

        `limit`: number of global batches, spread evenly over the table. Every rank gets the same number of batches. Raises
        DataError for a global batch not divisible by the ranks, and for an empty table.
        """
        first, end = rank_rows(global_batch, rank, world_size)
        if not len(self):
            raise DataError(f"{self.origin}: no rows to validate on")
        numbers = eval_batch_indices(len(self), global_batch, limit)
        rows = np.arange(first, end, dtype=np.int64)
        return (self.rows(number * global_batch + rows) for number in numbers)

    def save(self, folder: Path) -> None:
        """Write the table to `folder` atomically; the folder must not exist."""
        temporary = folder.with_name(folder.name + TEMPORARY)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            make_private(temporary, new=True)
            entries = {name: write_array(temporary / f"{name}.npy", array) for name, array in self.arrays.items()}
            content = {"format": FORMAT, "version": VERSION, "rows": len(self), "fingerprint": self.fingerprint}
            content |= {"padding": self.padding, "facts": self.stats, "arrays": entries}
            write_json(temporary / INDEX, content, durable=True)
            os.rename(temporary, folder)
            sync_folder(folder.parent)
        except OSError as error:
            raise DataError(f"{error.filename or folder}: cannot be written ({error.strerror or error})") from None

    @staticmethod
    def load(folder: Path) -> Table:
        """Return a saved table, memory-mapped, after checking every file's size and sha256 against the index. Raises DataError."""
        path = folder / INDEX
        try:
            raw = load_json(path)
            if raw["format"] != FORMAT or raw["version"] != VERSION:
                raise DataError(
                    f"{path}: must have format {FORMAT!r} version {VERSION}",
                    found=f"{raw['format']!r} version {raw['version']}",
                )
            arrays = {name: open_array(folder, name, entry, raw["rows"]) for name, entry in raw["arrays"].items()}
            return Table(arrays, raw["fingerprint"], raw["padding"], raw["facts"], str(folder))
        except FileNotFoundError as error:
            raise DataError(f"{error.filename}: no such file", fix=REBUILD.format(folder)) from None
        except OSError as error:
            raise DataError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: damaged ({type(error).__name__}: {error})", fix=REBUILD.format(folder)) from None


REBUILD = "rm -r {}; it is rebuilt"


def positions(cursor: Cursor, global_batch: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
    """Return the sample positions of the training batch that was yielded with `cursor`: int64 (rows,)."""
    first, end = rank_rows(global_batch, rank, world_size)
    return cursor.samples - global_batch + np.arange(first, end, dtype=np.int64)


def eval_batch_indices(rows: int, global_batch: int, limit: int | None) -> list[int]:
    """Return the indices of the global batches to evaluate, spread evenly over the table."""
    batches = -(-rows // global_batch)
    taken = batches if limit is None else min(limit, batches)
    return [index * batches // taken for index in range(taken)]


def to_int64(array: np.ndarray) -> np.ndarray:
    """Return int32 arrays as int64, which losses and embeddings need; others unchanged."""
    return array.astype(np.int64) if array.dtype == np.int32 else array


def write_array(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Write one array with fsync; return its index entry."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    with path.open("wb") as file:
        np.save(file, little, allow_pickle=False)
        sync(file)
    shape = list(array.shape)
    return {"dtype": array.dtype.name, "shape": shape, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def open_array(folder: Path, name: str, entry: Mapping[str, Any], rows: int) -> np.ndarray:
    """Return one array as a read-only memory map. Raises DataError if the file differs from its index entry."""
    if Path(name).name != name:
        raise DataError(f"{folder / INDEX}: array name must be a plain file name", found=repr(name))
    path = folder / f"{name}.npy"
    if not path.is_file():
        raise DataError(f"{path}: missing, or not a file, but listed in {INDEX}", fix=REBUILD.format(folder))
    size = path.stat().st_size
    if size != entry["bytes"]:
        state = "truncated" if size < entry["bytes"] else "too long"
        raise DataError(f"{path}: {state}, expected {entry['bytes']} bytes", found=size, fix=REBUILD.format(folder))
    if sha256_of(path) != entry["sha256"]:
        raise DataError(f"{path}: changed since it was written (sha256 differs from {INDEX})", fix=REBUILD.format(folder))
    # mmap rejects empty files.
    array = np.load(path, mmap_mode="r" if rows else None, allow_pickle=False)
    if array.dtype.name != entry["dtype"] or list(array.shape) != entry["shape"] or not array.ndim or len(array) != rows:
        raise DataError(
            f"{path}: must be {entry['dtype']} {entry['shape']} with {rows} rows by {INDEX}",
            found=f"{array.dtype} {list(array.shape)}",
        )
    return array.view(np.ndarray)  # slicing np.memmap takes twice as long
