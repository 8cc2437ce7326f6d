"""Split encoded conversations into training and validation, and conversations into answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gptoughts.data.chat.answers import RenderedChat
from gptoughts.data.chat.packing import Document
from gptoughts.data.chat.tokenizer import Encoded
from gptoughts.errors import DataError


@dataclass(frozen=True)
class Row:
    """One conversation: digest of its messages, encoded texts, and the rendered chat with its counts."""

    digest: bytes
    documents: list[Document]
    chat: RenderedChat


def split_by_digest(rows: Sequence[Row], fraction: float) -> dict[str, list[Row]]:
    """Split into train and validation by digest, so that equal conversations stay together; neither is empty.

    Raises DataError for fewer than two different conversations.
    """
    limit = int(fraction * 2**64)
    places = {row.digest: int.from_bytes(row.digest[:8], "big") for row in rows}
    if len(places) < 2:
        raise DataError(
            "data.val_fraction: needs at least two different conversations", found=len(places), fix="--data.val-fraction 0"
        )
    val = {digest for digest, place in places.items() if place < limit} or {min(places, key=lambda digest: places[digest])}
    if len(val) == len(places):
        val.remove(max(places, key=lambda digest: places[digest]))
    return {
        "train": [row for row in rows if row.digest not in val],
        "val": [row for row in rows if row.digest in val],
    }


def split_answers(encoded: Encoded, where: str) -> Iterator[Document]:
    """Yield one document per answer: it ends with the answer, its only label span."""
    edges = np.flatnonzero(np.diff(encoded.learned.astype(np.int8), prepend=0, append=0))
    for start, end in edges.reshape(-1, 2).tolist():
        if end > 1:  # the first token is never a label
            yield Document(encoded.ids[:end], np.arange(end) >= start, where)


def count_runs(learned: np.ndarray) -> int:
    """Return the number of runs of true values."""
    return int(learned[0]) + int((np.diff(learned.astype(np.int8)) == 1).sum())
