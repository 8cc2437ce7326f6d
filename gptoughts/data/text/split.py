"""Which part of a corpus is kept for validation: whole documents, or the tail of the text."""

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
    """`none`, `tail` or `documents`: what `val_from` means for this corpus. Raises DataError for an unknown word or share."""
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction = {val_fraction}: give a share from 0 up to, not including, 1")
    if val_from not in ("auto", "tail", "documents"):
        raise DataError(f"val_from = {val_from!r}: give auto, tail or documents")
    if val_fraction == 0:
        return "none"
    if val_from != "auto":
        return val_from
    return "documents" if sum(1 for _ in islice(source.documents(), FEW_DOCUMENTS)) == FEW_DOCUMENTS else "tail"


def divided(source: Source, val_fraction: float, rule: str) -> Iterator[tuple[str, Document]]:
    """Every document with its split. The document at the border of a tail comes as two, each in its own split."""
    if rule == "none":
        return ((TRAIN, document) for document in source.documents())
    return by_tail(source, val_fraction) if rule == "tail" else by_documents(source, val_fraction)


def by_tail(source: Source, val_fraction: float) -> Iterator[tuple[str, Document]]:
    """The last `val_fraction` of the corpus's characters is validation; the first `int(characters * (1 - val_fraction))` is not."""
    total = sum(len(document.text) for document in source.documents())
    border = int(total * (1 - val_fraction))
    if border in (0, total):
        raise DataError(
            f"source {source.spec!r}: {total} characters are too few to keep a share of {val_fraction}; give more text, or val_fraction 0"
        )
    seen = 0
    for document in source.documents():
        here = min(max(border - seen, 0), len(document.text))
        seen += len(document.text)
        if here:
            yield TRAIN, replace(document, text=document.text[:here]) if here < len(document.text) else document
        if here < len(document.text):
            yield VAL, replace(document, text=document.text[here:]) if here else document


def by_documents(source: Source, val_fraction: float) -> Iterator[tuple[str, Document]]:
    """Whole documents whose position hashes below `val_fraction`; at least one, and not all of them."""
    limit = int(val_fraction * 2**64)
    # Beyond this many documents the chance that none was chosen, or all were, is below e^-50.
    enough = ceil(50 / min(val_fraction, 1 - val_fraction))
    count = sum(1 for _ in islice(source.documents(), enough))
    chosen = None
    if count < enough:
        if count == 1:
            raise DataError(
                f"source {source.spec!r}: one document cannot be shared by documents; type: --val-from tail, or val_fraction 0"
            )
        hashes = [position_hash(position) for position in range(count)]
        chosen = {position for position in range(count) if hashes[position] < limit} or {hashes.index(min(hashes))}
        if len(chosen) == count:
            chosen.remove(hashes.index(max(hashes)))
    for position, document in enumerate(source.documents()):
        held = position_hash(position) < limit if chosen is None else position in chosen
        yield (VAL if held else TRAIN), document


def position_hash(position: int) -> int:
    """A 64-bit hash of a document's position (splitmix64, Steele et al. 2014): the same on every machine."""
    value = (position + 1) * 0x9E3779B97F4A7C15 & MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31
