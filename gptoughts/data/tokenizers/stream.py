"""Decode token ids one by one."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """The part of a tokenizer that turns ids into text."""

    def token_bytes(self, index: int) -> bytes | None:
        """Return the bytes of a token; None if tokens are not bytes."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids."""


class StreamDecoder:
    """Incremental decoder; an incomplete UTF-8 character is held back until it is complete."""

    def __init__(self, tokenizer: Decoder) -> None:
        self.tokenizer = tokenizer
        self.bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.ids: list[int] = []
        self.shown = 0

    def push(self, index: int) -> str:
        """Return the text that is final after this id; often empty."""
        raw = self.tokenizer.token_bytes(int(index))
        if raw is not None:
            return self.bytes.decode(raw)
        # Tokens that are not bytes: decode the last shown ids and the new ones together, as a word's first space depends on them.
        self.ids.append(int(index))
        before = self.tokenizer.decode(self.ids[: self.shown])
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}") or len(text) <= len(before):
            return ""
        self.ids, self.shown = self.ids[self.shown :], len(self.ids) - self.shown
        return text[len(before) :]

    def close(self) -> str:
        """Return the remaining text; an incomplete character becomes U+FFFD."""
        rest = self.bytes.decode(b"", final=True)
        text = self.tokenizer.decode(self.ids)[len(self.tokenizer.decode(self.ids[: self.shown])) :] if self.ids else ""
        self.ids, self.shown = [], 0
        return rest + text
