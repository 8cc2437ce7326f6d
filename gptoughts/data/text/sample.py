"""Bounded, deterministic samples of a corpus for training and checking tokenizers."""

from __future__ import annotations

from collections.abc import Iterator

from gptoughts.data.text.sources import Source


def first_characters(source: Source, limit: int) -> list[str]:
    """Return the first documents, each cut to a fiftieth of `limit` characters, until `limit` is reached."""
    sample: list[str] = []
    total = 0
    for document in source.documents():
        sample.append(document.text[: limit // 50])
        total += len(sample[-1])
        if total >= limit:
            break
    return sample


def spread_sample(source: Source, limit: int, block: int = 65536) -> Iterator[str]:
    """Yield about `limit` characters in blocks spread evenly over the corpus; all documents where the corpus is smaller."""
    total = sum(len(document.text) for document in source.documents())
    if total <= limit:
        yield from (document.text for document in source.documents())
        return
    offset = 0
    for document in source.documents():
        for start in range(0, len(document.text), block):
            part = document.text[start : start + block]
            # Take a block when its end crosses the next multiple of total * block / limit characters.
            if (offset + len(part)) * limit // (total * block) > offset * limit // (total * block):
                yield part
            offset += len(part)


def cut_anywhere(text: str, characters: int) -> Iterator[str]:
    """Cut a text into parts of `characters`; an empty text is one empty part."""
    return (text[start : start + characters] for start in range(0, max(len(text), 1), characters))
