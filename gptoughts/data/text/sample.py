"""Parts of a corpus for training and checking tokenizers: bounded, and the same every time."""

from __future__ import annotations

from collections.abc import Iterator

from gptoughts.data.text.sources import Source


def first_characters(source: Source, limit: int) -> list[str]:
    """The first documents, each cut to a fiftieth of `limit` characters, until `limit` is reached."""
    taken: list[str] = []
    total = 0
    for document in source.documents():
        taken.append(document.text[: limit // 50])
        total += len(taken[-1])
        if total >= limit:
            break
    return taken


def spread_sample(source: Source, limit: int, block: int = 65536) -> Iterator[str]:
    """About `limit` characters in blocks spread evenly over the corpus; all of it, document by document, where it is smaller."""
    total = sum(len(document.text) for document in source.documents())
    if total <= limit:
        yield from (document.text for document in source.documents())
        return
    seen = 0
    for document in source.documents():
        for start in range(0, len(document.text), block):
            part = document.text[start : start + block]
            # A block is taken when its last character carries the share of the text taken so far past the next whole block.
            if (seen + len(part)) * limit // (total * block) > seen * limit // (total * block):
                yield part
            seen += len(part)
