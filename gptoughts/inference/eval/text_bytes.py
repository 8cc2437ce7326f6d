"""Bits per byte: the loss of a text over the bytes of its UTF-8, which models with different tokenizers can be compared by.

The bytes are counted, not estimated: every label stands for the bytes of its token, and end-of-text for none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from gptoughts.data.tokenizers.tokenizer import Tokenizer
from gptoughts.engine.engine import Engine
from gptoughts.engine.objectives.base import IGNORED
from gptoughts.inference.eval.perplexity import perplexity

CHUNK = 1 << 20
"""Ids whose bytes are looked up at once."""


class LabelBytes:
    """Counts the bytes of the labels of next-token batches that pass through `counted`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Look up the length of every token. Raises ValueError if tokens are not bytes, see `lengths_of`."""
        lengths = lengths_of(tokenizer)
        if lengths is None:
            raise ValueError("tokenizer: its tokens are not bytes")
        self._lengths = lengths
        self.total = 0

    def counted(self, batches: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """Yield the batches of arrays unchanged; `total` is the number of bytes of their labels since the start."""
        self.total = 0
        for batch in batches:
            labels = np.asarray(batch.get("labels", batch["input_ids"]))[:, 1:]
            self.total += int(self._lengths[labels[labels != IGNORED]].sum())
            yield batch

    def row(self, engine: Engine, loss: float, labels: int) -> dict[str, Any]:
        """Return the metrics of a validation with a mean `loss` in nats over `labels`; bytes are summed over ranks."""
        count = int(engine.ranks.sum(torch.tensor(self.total, device=engine.device)).item())
        return {"eval/perplexity": perplexity(loss), "eval/bits_per_byte": bits_per_byte(loss * labels, count)}


def has_byte_tokens(tokenizer: Tokenizer) -> bool:
    """Return whether the bytes of every token are known."""
    return tokenizer.token_bytes(0) is not None


def lengths_of(tokenizer: Tokenizer) -> np.ndarray | None:
    """Return the bytes of each token, int64 (vocabulary,). None if tokens are not bytes, as those of SentencePiece and WordPiece."""
    pieces = [tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)]
    known = [len(piece) for piece in pieces if piece is not None]
    return np.array(known, dtype=np.int64) if len(known) == len(pieces) else None


def label_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    """Return the bytes of all `ids` but the first, which no label stands for.

    Tokens that are not bytes are decoded, document by document: the decoded text can differ from the original in spaces and case.
    """
    lengths = lengths_of(tokenizer)
    if lengths is not None:
        return sum(int(lengths[ids[start : start + CHUNK]].sum()) for start in range(1, len(ids), CHUNK))
    ends = np.flatnonzero(ids == tokenizer.eot_id)
    documents = np.split(ids, ends)
    total = sum(len(tokenizer.decode(document.tolist()).encode()) for document in documents)
    return total - len(tokenizer.decode(ids[:1].tolist()).encode())


def bits_per_byte(nats: float, count: int) -> float | None:
    """Return the bits per byte of a summed loss; None for a text without bytes."""
    return nats / math.log(2) / count if count else None
