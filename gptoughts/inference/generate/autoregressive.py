"""Autoregressive generation with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from gptoughts.errors import ConfigError, DataError
from gptoughts.inference.generate.sampling import check_sampling, sample
from gptoughts.models.eager import eager_inference
from gptoughts.models.gpt.gpt import GPT, KeyValueCache

Read = Callable[[list[int]], Tensor]
"""Takes the ids that follow those of earlier calls; returns the logits (V) of the next token."""


class Reader(Protocol):
    """Interface of a model for generation."""

    sequence_length: int
    """Maximum context in tokens."""
    vocab_size: int

    def reading(self) -> Read:
        """Start an empty context."""


class GPTReader:
    """Native GPT with its key-value cache."""

    def __init__(self, model: GPT) -> None:
        self._model = model
        self.sequence_length, self.vocab_size = model.sequence_length, model.vocab_size

    def reading(self) -> Read:
        """Start an empty cache."""
        cache, device = KeyValueCache(len(self._model.blocks), self.sequence_length), self._model.embed.weight.device
        return lambda ids: self._model(torch.tensor([ids], device=device), cache=cache)[0, -1]  # V


def reader_of(model: torch.nn.Module) -> Reader:
    """Return `model.reader()`, or a `GPTReader` for the native GPT. Raises ConfigError for a model without either."""
    if isinstance(model, GPT) and model.causal:
        return GPTReader(model)
    own: Callable[[], Reader] | None = getattr(model, "reader", None)
    if own is not None:
        return own()
    raise ConfigError(f"model: {type(model).__name__} does not generate token by token")


OnText = Callable[[int, str], None]
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""Decoded text ends with this if the last character is incomplete."""
CONTEXT_IDS = 4
"""Number of preceding ids that are decoded together with new ones."""
Prompt = TypeVar("Prompt", str, list[int])


class Tokenizer(Protocol):
    """Interface of a tokenizer for generation."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eot_id(self) -> int | None: ...

    def encode(self, text: str, /) -> Iterable[int]: ...

    def decode(self, ids: Sequence[int], /) -> str: ...


def generate(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
    stop_at_eot: bool = True,
    on_text: OnText | None = None,
    stops: Collection[int] = (),
) -> list[Prompt]:
    """Continue each prompt by at most `max_new_tokens`; returns the continuations without prompts, as text or ids like the prompts.

    Prompts are processed one by one, each with its own generator seeded by `seed`, so the result does not depend on other
    prompts. An empty prompt starts from end-of-text. With `stop_at_eot`, end-of-text ends the text and is excluded, as are the
    ids in `stops`, such as a chat's end of turn.
    `on_text(prompt index, piece)` receives text as soon as its characters are complete.

    A prompt longer than the context keeps its last tokens. When the context is full, its newest half is read again from position
    0: one forward over T/2 tokens every T/2 tokens.
    Raises ConfigError for settings out of range, DataError for ids outside the vocabulary.
    """
    check_sampling(temperature, top_k, top_p)
    if max_new_tokens < 1:
        raise ConfigError("max_new_tokens: must be at least 1", found=max_new_tokens)
    reader = reader_of(model)
    limit = min(tokenizer.vocab_size, reader.vocab_size)
    starts = [_prompt_ids(tokenizer, prompt, limit) for prompt in prompts]
    results: list[Any] = []
    with eager_inference(model):
        for index, start in enumerate(starts):
            generator = torch.Generator("cpu").manual_seed(seed)
            stream = _Stream(tokenizer, index, start, on_text)
            for logits in next_logits(reader, start, stream.ids):
                token = sample(logits, temperature, top_k, top_p, generator, limit)
                if (stop_at_eot and token == tokenizer.eot_id) or token in stops:
                    break
                stream.add(token)
                if len(stream.ids) == max_new_tokens:
                    break
            stream.close()
            results.append(stream.ids)
    if prompts and isinstance(prompts[0], str):
        results = [continuation(tokenizer, start, ids) for start, ids in zip(starts, results, strict=True)]
    return results


def _prompt_ids(tokenizer: Tokenizer, prompt: str | Sequence[int], limit: int) -> list[int]:
    ids = [int(token) for token in (tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)]
    if not ids:
        if tokenizer.eot_id is None:
            raise DataError("prompt: empty, and the tokenizer has no end-of-text token to start from", fix="a prompt")
        ids = [tokenizer.eot_id]
    outside = [token for token in ids if not 0 <= token < limit]
    if outside:
        raise DataError(f"prompt: token ids must be below the vocabulary size {limit}", found=outside[0])
    return ids


def next_logits(reader: Reader, start: list[int], generated: list[int]) -> Iterator[Tensor]:
    """Yield the logits (V) of the token after `start` and `generated`; the caller appends a token to `generated` each time."""
    length, used = reader.sequence_length, 0
    read, unread = reader.reading(), start[-reader.sequence_length :]
    while True:
        if used + len(unread) > length:
            unread, used = (start + generated)[-max(1, length // 2) :], 0
            read = reader.reading()
        used += len(unread)
        yield read(unread)
        unread = generated[-1:]


def continuation(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """Decode `ids` as the continuation of `before`, which decides on a leading space in tokenizers whose words carry one."""
    context = _decoding_context(tokenizer, before)
    return tokenizer.decode([*context, *ids])[len(_decode(tokenizer, context)) :] if ids else ""


def _decoding_context(tokenizer: Tokenizer, before: Sequence[int]) -> list[int]:
    """Return the last ids of `before`, to decode new ids with; none if they end within a character."""
    context = list(before[-CONTEXT_IDS:])
    return [] if _decode(tokenizer, context).endswith(INCOMPLETE) else context


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids) if ids else ""


class _Stream:
    """Generated ids; their text is passed to `on_text` as soon as its characters are complete."""

    def __init__(self, tokenizer: Tokenizer, index: int, start: list[int], on_text: OnText | None) -> None:
        self.tokenizer, self.index, self.on_text = tokenizer, index, on_text
        self.ids: list[int] = []
        self._emitted = _decoding_context(tokenizer, start)
        """Last ids whose text is emitted; only these, so that the cost per token does not grow with the text."""
        self._pending: list[int] = []

    def add(self, token: int) -> None:
        self.ids.append(token)
        if self.on_text is not None:
            self._pending.append(token)
            self._emit()

    def close(self) -> None:
        if self.on_text is not None and self._pending:
            self._emit(last=True)

    def _emit(self, last: bool = False) -> None:
        text = self.tokenizer.decode([*self._emitted, *self._pending])
        if text.endswith(INCOMPLETE) and not last:
            return
        piece = text[len(_decode(self.tokenizer, self._emitted)) :]
        self._emitted, self._pending = [*self._emitted, *self._pending][-max(CONTEXT_IDS, len(self._pending)) :], []
        if piece and self.on_text is not None:
            self.on_text(self.index, piece)
