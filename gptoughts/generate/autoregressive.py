"""Text from a model that predicts the next token, one token at a time, with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, overload

import torch
from torch import Tensor

from gptoughts.errors import ConfigError, DataError
from gptoughts.generate.sampling import check_sampling, sample
from gptoughts.models.gpt import GPT, KeyValueCache

OnText = Callable[[int, str], None]


class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eot_id(self) -> int | None: ...

    def encode(self, text: str, /) -> Iterable[int]: ...

    def decode(self, ids: Sequence[int], /) -> str: ...


@overload
def generate(
    model: GPT, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: int = ..., temperature: float = ...,
    top_k: int = ..., top_p: float = ..., seed: int = ..., stop_at_eot: bool = ..., on_text: OnText | None = ...,
) -> list[str]: ...  # fmt: skip
@overload
def generate(
    model: GPT, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int = ..., temperature: float = ...,
    top_k: int = ..., top_p: float = ..., seed: int = ..., stop_at_eot: bool = ..., on_text: OnText | None = ...,
) -> list[list[int]]: ...  # fmt: skip
def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: list[str] | list[list[int]],
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
    stop_at_eot: bool = True,
    on_text: OnText | None = None,
) -> list[str] | list[list[int]]:
    """Continue each prompt by at most `max_new_tokens`; returns the continuations alone, text for text and ids for ids.

    Prompts are written one after the other, each with a generator of its own from `seed`: what a prompt gets does not
    depend on its neighbours. An empty prompt starts from end-of-text; `stop_at_eot` ends at it and leaves it out.
    `on_text(index of the prompt, piece)` receives text as soon as its characters are complete.

    A prompt longer than the context keeps its last tokens. Once the context is full, the newest half of it is read
    again from position 0 and writing goes on: one forward over T/2 tokens every T/2 tokens.
    Raises ConfigError for settings out of range, DataError for ids that the tokenizer does not have.
    """
    check_sampling(temperature, top_k, top_p)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens = {max_new_tokens} must be at least 1")
    limit = min(tokenizer.vocab_size, model.vocab_size)
    starts = [_start(tokenizer, prompt, limit) for prompt in prompts]
    written: list[list[int]] = []
    with _reading(model):
        for index, start in enumerate(starts):
            generator = torch.Generator("cpu").manual_seed(seed)
            stream = _Stream(tokenizer, index, on_text)
            for logits in _next_logits(model, start, stream.ids):
                token = sample(logits, temperature, top_k, top_p, generator, limit)
                if stop_at_eot and token == tokenizer.eot_id:
                    break
                stream.add(token)
                if len(stream.ids) == max_new_tokens:
                    break
            stream.close()
            written.append(stream.ids)
    if prompts and isinstance(prompts[0], str):
        return [tokenizer.decode(ids) if ids else "" for ids in written]
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


def _next_logits(model: GPT, start: list[int], written: list[int]) -> Iterator[Tensor]:
    """Logits (V) of the token that follows `start` and `written`, again after each token that the caller adds there."""
    length, device = model.sequence_length, model.embed.weight.device
    cache = KeyValueCache(len(model.blocks), length)
    unread = start[-length:]
    while True:
        if cache.used + len(unread) > length:
            unread = (start + written)[-max(1, length // 2) :]
            cache = KeyValueCache(len(model.blocks), length)
        yield model(torch.tensor([unread], device=device), cache=cache)[0, -1]  # V
        unread = written[-1:]


@contextmanager
def _reading(model: GPT) -> Iterator[None]:
    """Evaluation mode, no gradients, and eager blocks: each new length would otherwise be compiled once more."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(training)


class _Stream:
    """The ids written so far, and the text of them that has been passed on."""

    def __init__(self, tokenizer: Tokenizer, index: int, on_text: OnText | None) -> None:
        self.tokenizer, self.index, self.on_text = tokenizer, index, on_text
        self.ids: list[int] = []
        self.passed_on = 0  # characters

    def add(self, token: int) -> None:
        self.ids.append(token)
        if self.on_text is not None:
            text = self.tokenizer.decode(self.ids)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the last character may lack bytes
                self._pass_on(text)

    def close(self) -> None:
        if self.on_text is not None and self.ids:
            self._pass_on(self.tokenizer.decode(self.ids))

    def _pass_on(self, text: str) -> None:
        piece = text[self.passed_on :]
        self.passed_on = len(text)
        if piece and self.on_text is not None:
            self.on_text(self.index, piece)
