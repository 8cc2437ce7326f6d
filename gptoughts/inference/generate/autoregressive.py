"""Text from a model that predicts the next token, one token at a time, with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Protocol, overload

import torch
from torch import Tensor

from gptoughts.errors import ConfigError, DataError
from gptoughts.inference.generate.sampling import check_sampling, sample
from gptoughts.models.eager import eager_reading
from gptoughts.models.gpt.gpt import GPT, KeyValueCache

Read = Callable[[list[int]], Tensor]
"""Takes the ids that follow those it took before; returns the logits (V) of the next one."""


class Reader(Protocol):
    """What generation needs of a model."""

    sequence_length: int
    """Tokens of context at most."""
    vocab_size: int

    def reading(self) -> Read:
        """A fresh context."""


class GPTReader:
    """The native GPT with its key-value cache."""

    def __init__(self, model: GPT) -> None:
        self._model = model
        self.sequence_length, self.vocab_size = model.sequence_length, model.vocab_size

    def reading(self) -> Read:
        """A fresh cache."""
        cache, device = KeyValueCache(len(self._model.blocks), self.sequence_length), self._model.embed.weight.device
        return lambda ids: self._model(torch.tensor([ids], device=device), cache=cache)[0, -1]  # V


def reader_of(model: torch.nn.Module) -> Reader:
    """The reader that a model brings as `reader()`, or ours for the native GPT. Raises ConfigError where there is none."""
    if isinstance(model, GPT) and model.causal:
        return GPTReader(model)
    own: Callable[[], Reader] | None = getattr(model, "reader", None)
    if own is not None:
        return own()
    raise ConfigError(f"a {type(model).__name__} does not write text token by token")


OnText = Callable[[int, str], None]
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a text ends with whose last character lacks bytes."""
SEAM = 4
"""Ids before new ones that are decoded with them."""


class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eot_id(self) -> int | None: ...

    def encode(self, text: str, /) -> Iterable[int]: ...

    def decode(self, ids: Sequence[int], /) -> str: ...


def generate(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    prompts: list[str] | list[list[int]],
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
    stop_at_eot: bool = True,
    on_text: OnText | None = None,
    stops: Collection[int] = (),
) -> list[str] | list[list[int]]:
    """Continue each prompt by at most `max_new_tokens`; returns the continuations alone, text for text and ids for ids.

    Prompts are written one after the other, each with a generator of its own from `seed`: what a prompt gets does not
    depend on its neighbors. An empty prompt starts from end-of-text; `stop_at_eot` ends at it and leaves it out, and so
    do the ids in `stops`, such as a chat's end of turn.
    `on_text(index of the prompt, piece)` receives text as soon as its characters are complete.

    A prompt longer than the context keeps its last tokens. Once the context is full, the newest half of it is read
    again from position 0 and writing goes on: one forward over T/2 tokens every T/2 tokens.
    Raises ConfigError for settings out of range, DataError for ids that the tokenizer does not have.
    """
    check_sampling(temperature, top_k, top_p)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens = {max_new_tokens} must be at least 1")
    reader = reader_of(model)
    limit = min(tokenizer.vocab_size, reader.vocab_size)
    starts = [_start(tokenizer, prompt, limit) for prompt in prompts]
    written: list[list[int]] = []
    with eager_reading(model):
        for index, start in enumerate(starts):
            generator = torch.Generator("cpu").manual_seed(seed)
            stream = _Stream(tokenizer, index, start, on_text)
            for logits in _next_logits(reader, start, stream.ids):
                token = sample(logits, temperature, top_k, top_p, generator, limit)
                if (stop_at_eot and token == tokenizer.eot_id) or token in stops:
                    break
                stream.add(token)
                if len(stream.ids) == max_new_tokens:
                    break
            stream.close()
            written.append(stream.ids)
    if prompts and isinstance(prompts[0], str):
        return [continuation(tokenizer, start, ids) for start, ids in zip(starts, written, strict=True)]
    return written


def _start(tokenizer: Tokenizer, prompt: str | Sequence[int], limit: int) -> list[int]:
    ids = [int(token) for token in (tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)]
    if not ids:
        if tokenizer.eot_id is None:
            raise DataError("an empty prompt starts from end-of-text, and this tokenizer has none; write a prompt")
        ids = [tokenizer.eot_id]
    outside = [token for token in ids if not 0 <= token < limit]
    if outside:
        raise DataError(f"token id {outside[0]} of the prompt is outside the vocabulary of {limit}")
    return ids


def _next_logits(reader: Reader, start: list[int], written: list[int]) -> Iterator[Tensor]:
    """Logits (V) of the token that follows `start` and `written`, again after each token that the caller adds there."""
    length, used = reader.sequence_length, 0
    read, unread = reader.reading(), start[-reader.sequence_length :]
    while True:
        if used + len(unread) > length:
            unread, used = (start + written)[-max(1, length // 2) :], 0
            read = reader.reading()
        used += len(unread)
        yield read(unread)
        unread = written[-1:]


def continuation(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` as it follows that of `before`: where words carry the space in front of them, it depends on what was there."""
    seam = _seam(tokenizer, before)
    return tokenizer.decode([*seam, *ids])[len(_text(tokenizer, seam)) :] if ids else ""


def _seam(tokenizer: Tokenizer, before: Sequence[int]) -> list[int]:
    """The last of `before`, with which new ids are decoded; none where they end within a character."""
    seam = list(before[-SEAM:])
    return [] if _text(tokenizer, seam).endswith(INCOMPLETE) else seam


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids) if ids else ""


class _Stream:
    """The ids written so far, and their text, passed on as soon as its characters are complete."""

    def __init__(self, tokenizer: Tokenizer, index: int, start: list[int], on_text: OnText | None) -> None:
        self.tokenizer, self.index, self.on_text = tokenizer, index, on_text
        self.ids: list[int] = []
        self._shown = _seam(tokenizer, start)
        """Ids whose text is out already; only the last ones, so that a token costs the same however long the text is."""
        self._waiting: list[int] = []

    def add(self, token: int) -> None:
        self.ids.append(token)
        if self.on_text is not None:
            self._waiting.append(token)
            self._pass_on()

    def close(self) -> None:
        if self.on_text is not None and self._waiting:
            self._pass_on(last=True)

    def _pass_on(self, last: bool = False) -> None:
        text = self.tokenizer.decode([*self._shown, *self._waiting])
        if text.endswith(INCOMPLETE) and not last:
            return
        piece = text[len(_text(self.tokenizer, self._shown)) :]
        self._shown, self._waiting = [*self._shown, *self._waiting][-max(SEAM, len(self._waiting)) :], []
        if piece and self.on_text is not None:
            self.on_text(self.index, piece)
