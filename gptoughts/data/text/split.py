"""Split a corpus into training and validation: by whole documents, or at the tail of the text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from math import ceil

from gptoughts.data.text.sources import Document, Source
from gptoughts.errors import DataError

TRAIN, VAL = "train", "val"
FEW_DOCUMENTS = 100
MASK = (1 << 64) - 1


def resolve_rule(source: Source, val_fraction: float, val_from: str) -> str:
    """Return `none`, `tail` or `documents`. Raises DataError for an unknown `val_from` or a fraction outside [0, 1)."""
    if not 0 <= val_fraction < 1:
        raise DataError("val_fraction: must be at least 0 and below 1", found=val_fraction)
    if val_from not in ("auto", "tail", "documents"):
        raise DataError("val_from: must be auto, tail or documents", found=repr(val_from))
    if val_fraction == 0:
        return "none"
    if val_from != "auto":
        return val_from
    return "documents" if sum(1 for _ in islice(source.documents(), FEW_DOCUMENTS)) == FEW_DOCUMENTS else "tail"


def split_documents(source: Source, val_fraction: float, rule: str) -> Iterator[tuple[str, Document]]:
    """Yield every document with its split. With `tail`, the document at the boundary is cut and yielded once per split."""
    if rule == "none":
        return ((TRAIN, document) for document in source.documents())
    return split_at_tail(source, val_fraction) if rule == "tail" else split_by_position(source, val_fraction)


def split_at_tail(source: Source, val_fraction: float) -> Iterator[tuple[str, Document]]:
    """Assign the first `int(characters * (1 - val_fraction))` characters of the corpus to training, the rest to validation."""
    total = sum(len(document.text) for document in source.documents())
    boundary = int(total * (1 - val_fraction))
    if boundary in (0, total):
        raise DataError(
            f"source {source.spec!r}: too short for val_fraction {val_fraction}",
            found=f"{total} characters",
            fix="more text, or val_fraction 0",
        )
    start = 0
    for document in source.documents():
        cut = min(max(boundary - start, 0), len(document.text))
        start += len(document.text)
        if cut:
            yield TRAIN, replace(document, text=document.text[:cut]) if cut < len(document.text) else document
        if cut < len(document.text):
            yield VAL, replace(document, text=document.text[cut:]) if cut else document


def split_by_position(source: Source, val_fraction: float) -> Iterator[tuple[str, Document]]:
    """Assign whole documents by a hash of their position; each split gets at least one."""
    limit = int(val_fraction * 2**64)
    # With this many documents or more, the probability of an empty split is below e^-50.
    enough = ceil(50 / min(val_fraction, 1 - val_fraction))
    count = sum(1 for _ in islice(source.documents(), enough))
    chosen = None
    if count < enough:
        if count == 1:
            raise DataError(
                f"source {source.spec!r}: one document cannot be split by documents",
                fix="--val-from tail, or val_fraction 0",
            )
        hashes = [position_hash(position) for position in range(count)]
        chosen = {position for position in range(count) if hashes[position] < limit} or {hashes.index(min(hashes))}
        if len(chosen) == count:
            chosen.remove(hashes.index(max(hashes)))
    for position, document in enumerate(source.documents()):
        is_val = position_hash(position) < limit if chosen is None else position in chosen
        yield (VAL if is_val else TRAIN), document


def position_hash(position: int) -> int:
    """Return a 64-bit hash of a document's position (splitmix64, Steele et al. 2014); the same on every machine."""
    value = (position + 1) * 0x9E3779B97F4A7C15 & MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31
