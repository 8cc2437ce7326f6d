"""Pack documents of different lengths into rows of one length, or put one in each row.

A row holds whole documents. Positions restart at 0 with each document, which separates them in attention.
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
    """Token ids and their label mask (bool, same shape). `where`: source file and line."""

    ids: np.ndarray
    learned: np.ndarray
    where: str = ""


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Return the document indices of each row: best fit decreasing. Deterministic in the lengths.

    Each document goes into the row with the least free space that holds it (Johnson 1973: at most 11/9 of the optimal number of
    rows, plus one). Raises DataError for a document longer than a row.
    """
    rows: list[list[int]] = []
    by_space: dict[int, list[int]] = {}  # free space -> rows; no empty lists
    spaces: list[int] = []  # sorted keys of by_space
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        _check_length(length, width)
        place = bisect_left(spaces, length)
        if place == len(spaces):
            rows.append([])
            row, space = len(rows) - 1, width
        else:
            space = spaces[place]
            row = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[place]
        rows[row].append(index)
        space -= length
        if space:
            if space not in by_space:
                by_space[space] = []
                insort(spaces, space)
            by_space[space].append(row)
    return rows


def one_per_row(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Return one row per document. Raises DataError for a document longer than a row."""
    for length in lengths:
        _check_length(length, width)
    return [[index] for index in range(len(lengths))]


def _check_length(length: int, width: int) -> None:
    if not 0 < length <= width:
        raise DataError(f"document: must have 1 to {width} tokens to fit a row", found=length)


def build_arrays(
    documents: Sequence[Document], rows: Sequence[Sequence[int]], width: int, pad_id: int, dtype: np.dtype[Any]
) -> dict[str, np.ndarray]:
    """Return the rows as arrays, each (rows, width): `input_ids` (dtype), `labels` and `positions` (int32).

    Labels are aligned with the ids. They are -100 on tokens outside the label mask, on the first token of each document and on
    padding. Padding is `pad_id`, as a document of its own at the end of a row.
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


def fill_ratio(lengths: Sequence[int], rows: int, width: int) -> float:
    """Return the share of positions that hold document tokens, the rest being padding; 0 without rows."""
    return sum(lengths) / (rows * width) if rows else 0.0
