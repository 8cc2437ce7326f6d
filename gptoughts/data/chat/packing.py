"""Documents of different lengths become rows of one length: several to a row, or one.

A row holds whole documents. Positions restart at 0 with each, which is how a model knows that they must not see each other.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptoughts.data.batches import IGNORED
from gptoughts.errors import DataError


@dataclass(frozen=True)
class Document:
    """Token ids, and which of them are learned (bool, same shape). `where` is the file and line that it came from."""

    ids: np.ndarray
    learned: np.ndarray
    where: str = ""


def packed(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Which documents share a row: best fit, longest first. The same lengths always give the same rows.

    Each document goes into the row with the least room that still holds it (Johnson 1973: at most 11/9 of the fewest rows
    there can be, plus one). Raises DataError for one that no row can hold.
    """
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {}  # Room left -> rows that have it; only rooms that some row has are keys.
    rooms: list[int] = []  # The keys, in order.
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        if not 0 < length <= width:
            raise DataError(f"a document of {length} tokens does not go into a row of {width}")
        place = bisect_left(rooms, length)
        if place == len(rooms):
            rows.append([])
            row, left = len(rows) - 1, width
        else:
            left = rooms[place]
            row = room[left].pop()
            if not room[left]:
                del room[left], rooms[place]
        rows[row].append(index)
        left -= length
        if left:
            if left not in room:
                room[left] = []
                insort(rooms, left)
            room[left].append(row)
    return rows


def single(lengths: Sequence[int], width: int) -> list[list[int]]:
    """A row for each document. Raises DataError for one that no row can hold."""
    for length in lengths:
        if not 0 < length <= width:
            raise DataError(f"a document of {length} tokens does not go into a row of {width}")
    return [[index] for index in range(len(lengths))]


def laid_out(
    documents: Sequence[Document], rows: Sequence[Sequence[int]], width: int, pad_id: int, dtype: np.dtype[Any]
) -> dict[str, np.ndarray]:
    """The rows as arrays, each (rows, width): `input_ids` (dtype), `labels` and `positions` (int32).

    Labels are aligned with the ids; -100 stands on what is not learned, on the first token of each document, which nothing
    comes before, and on the padding behind the last one. Padding is `pad_id` and a document of its own.
    """
    input_ids = np.full((len(rows), width), pad_id, dtype=dtype)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int32)
    positions = np.empty((len(rows), width), dtype=np.int32)
    count = np.arange(width, dtype=np.int32)
    for row, members in enumerate(rows):
        end = 0
        for index in members:
            document = documents[index]
            start, end = end, end + len(document.ids)
            input_ids[row, start:end] = document.ids
            labels[row, start:end] = np.where(document.learned, document.ids.astype(np.int32), IGNORED)
            labels[row, start] = IGNORED
            positions[row, start:end] = count[: end - start]
        positions[row, end:] = count[: width - end]
    return {"input_ids": input_ids, "labels": labels, "positions": positions}


def fill(lengths: Sequence[int], rows: int, width: int) -> float:
    """Share of the rows' places that documents take; the rest is padding. 0 where there are no rows."""
    return sum(lengths) / (rows * width) if rows else 0.0
