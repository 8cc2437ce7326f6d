"""Text by denoising: a stretch of masks behind the prompt is filled in over a number of steps, surest tokens first.

The reverse process of Nie et al. 2025 (LLaDA). What was written once stays; the stretch may be cut into blocks that are
finished from left to right. There is no cache: every token sees every other one, so each step reads the whole row again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, overload

import torch
from torch import Tensor

from gptoughts.errors import ConfigError, DataError, RunError
from gptoughts.inference.generate.autoregressive import Tokenizer, continuation
from gptoughts.models.eager import eager_reading

Remasking = Literal["low-confidence", "random"]
OnStep = Callable[[int, int, list[int]], None]
"""on_step(index of the prompt, steps done, its new ids so far: `mask_id` where nothing is written yet)."""

ROWS = 16


@dataclass(frozen=True)
class Schedule:
    """How many tokens each step of each block writes."""

    block_length: int
    commits: tuple[int, ...]
    """Per step of a block, without the steps that would write nothing."""


def schedule(max_new_tokens: int, steps: int, block_length: int | None = None) -> Schedule:
    """An even split of each block's tokens over its steps; what is left over goes to the first ones.

    `block_length` None is one block. More steps than tokens write one token each, and the others are left out.
    Raises ConfigError, with the nearest numbers that can, where blocks do not divide the text or the steps.
    """
    length = max_new_tokens if block_length is None else block_length
    for name, value in (("max_new_tokens", max_new_tokens), ("steps", steps), ("block_length", length)):
        if value < 1:
            raise ConfigError(f"{name} = {value} must be at least 1")
    if max_new_tokens % length:
        can = [number for number in range(1, max_new_tokens + 1) if max_new_tokens % number == 0]
        raise ConfigError(
            f"block_length = {length} does not divide the {max_new_tokens} new tokens; nearest that do: {_around(can, length)}"
        )
    blocks = max_new_tokens // length
    if steps % blocks:
        can = [blocks * number for number in range(1, steps // blocks + 2)]
        raise ConfigError(
            f"steps = {steps} cannot be shared by {blocks} blocks ({max_new_tokens} new tokens / block_length {length}); "
            f"nearest that can: {_around(can, steps)}"
        )
    each, more = divmod(length, steps // blocks)
    commits = [each + (step < more) for step in range(steps // blocks)]
    return Schedule(length, tuple(count for count in commits if count))


def _around(can: list[int], wanted: int) -> str:
    below, above = max((n for n in can if n < wanted), default=None), min((n for n in can if n > wanted), default=None)
    return " or ".join(str(number) for number in (below, above) if number is not None)


def check(
    max_new_tokens: int,
    steps: int,
    block_length: int | None,
    remasking: str,
    temperature: float,
    guidance: float,
    sequence_length: int,
) -> Schedule:
    """The schedule of settings that can be used, for a run to ask before its first step. Raises ConfigError otherwise."""
    planned = schedule(max_new_tokens, steps, block_length)
    if remasking not in ("low-confidence", "random"):
        raise ConfigError(f"remasking = {remasking!r} is neither low-confidence nor random")
    if not temperature >= 0:
        raise ConfigError(f"temperature = {temperature} must be 0 (the likeliest token) or more")
    if not guidance >= 0:
        raise ConfigError(f"guidance = {guidance} must be 0 (none) or more")
    if max_new_tokens > sequence_length:
        raise ConfigError(
            f"{max_new_tokens} new tokens are more than the model's sequence_length of {sequence_length}; ask for fewer"
        )
    return planned


@overload
def generate(
    model: Any, tokenizer: Tokenizer, prompts: list[str], mask_id: int, max_new_tokens: int = ..., steps: int = ...,
    block_length: int | None = ..., remasking: Remasking = ..., temperature: float = ..., guidance: float = ..., seed: int = ...,
    stop_at_eot: bool = ..., on_step: OnStep | None = ..., stops: Collection[int] = ...,
) -> list[str]: ...  # fmt: skip
@overload
def generate(
    model: Any, tokenizer: Tokenizer, prompts: list[list[int]], mask_id: int, max_new_tokens: int = ...,
    steps: int = ..., block_length: int | None = ..., remasking: Remasking = ..., temperature: float = ...,
    guidance: float = ..., seed: int = ..., stop_at_eot: bool = ..., on_step: OnStep | None = ...,
    stops: Collection[int] = ...,
) -> list[list[int]]: ...  # fmt: skip
def generate(
    model: Any,
    tokenizer: Tokenizer,
    prompts: list[str] | list[list[int]],
    mask_id: int,
    max_new_tokens: int = 128,
    steps: int = 128,
    block_length: int | None = None,
    remasking: Remasking = "low-confidence",
    temperature: float = 0.0,
    guidance: float = 0.0,
    seed: int = 0,
    stop_at_eot: bool = True,
    on_step: OnStep | None = None,
    stops: Collection[int] = (),
) -> list[str] | list[list[int]]:
    """Write `max_new_tokens` behind each prompt in `steps` steps; returns the new text alone, text for text, ids for ids.

    `model` is a GPT that reads both ways, or any module called like one with its `sequence_length` and `vocab_size`.

    Each step guesses every masked token of the block (with `temperature`, Gumbel noise in fp64 on the logits; 0 takes the
    likeliest) and keeps the guesses with most confidence, which is their probability before noise, or a number drawn for
    "random". `guidance` s moves logits away from those without the prompt: u + (s + 1) (c - u) (Ho and Salimans 2022).
    The mask and rows that pad the vocabulary are never written. `stop_at_eot` cuts at the first end-of-text, and so do the ids in `stops`.

    A prompt keeps its last tokens where it and the new ones exceed the context. What it gets depends on `seed` and on no
    neighbor: each has a generator of its own, and the padding of shorter prompts cannot be seen. (What no seed decides is an
    exact tie, as between the masks behind an empty prompt, where rounding does.)
    Raises ConfigError for settings out of range, DataError for ids that the tokenizer does not have.
    """
    length, rows = model.sequence_length, model.vocab_size
    planned = check(max_new_tokens, steps, block_length, remasking, temperature, guidance, length)
    if getattr(model, "causal", False):
        raise ConfigError("this model only looks back and cannot fill masks; generate from it token by token")
    limit = min(tokenizer.vocab_size, rows)
    if not 0 <= mask_id < rows:
        raise ConfigError(
            f"the mask is token {mask_id} and the model has {rows} embedding rows; it was not trained with this mask"
        )
    sampler = _Sampler(model, mask_id, limit, planned, remasking, temperature, guidance)
    room = length - max_new_tokens
    starts = [start[max(0, len(start) - room) :] for start in (_start(tokenizer, prompt, limit, mask_id) for prompt in prompts)]
    written: list[list[int]] = []
    with eager_reading(model):
        for first in range(0, len(starts), ROWS):
            written += sampler.write(starts[first : first + ROWS], max_new_tokens, seed, first, on_step)
    ends = {*stops, *([tokenizer.eot_id] if stop_at_eot else [])}
    written = [list(takewhile(lambda token: token not in ends, ids)) for ids in written]
    if prompts and isinstance(prompts[0], str):
        return [continuation(tokenizer, start, ids) for start, ids in zip(starts, written, strict=True)]
    return written


def _start(tokenizer: Tokenizer, prompt: str | Sequence[int], limit: int, mask_id: int) -> list[int]:
    ids = [int(token) for token in (tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)]
    outside = [token for token in ids if not 0 <= token < limit or token == mask_id]
    if outside:
        what = "is the mask" if outside[0] == mask_id else f"is outside the vocabulary of {limit}"
        raise DataError(f"token id {outside[0]} of the prompt {what}")
    return ids


@dataclass(frozen=True)
class _Sampler:
    """The reverse process over a batch of prompts."""

    model: Any
    mask_id: int
    limit: int
    """Ids from here on pad the vocabulary."""
    schedule: Schedule
    remasking: Remasking
    temperature: float
    guidance: float

    def write(self, prompts: list[list[int]], count: int, seed: int, first: int, on_step: OnStep | None) -> list[list[int]]:
        """`count` new ids behind each prompt; `first` is the number of the first one, for `on_step`."""
        ids, positions, prompted = self._rows(prompts, count)
        generators = [torch.Generator("cpu").manual_seed(seed) for _ in prompts]
        masked = torch.zeros_like(ids, dtype=torch.bool)
        masked[:, -count:] = True
        done = 0
        for begin in range(ids.shape[1] - count, ids.shape[1], self.schedule.block_length):
            end = begin + self.schedule.block_length
            for commits in self.schedule.commits:
                logits = self._logits(ids, positions, prompted, begin, end)  # B block V
                for row, generator in enumerate(generators):
                    open_places = masked[row, begin:end].nonzero().squeeze(1)
                    guesses, confidence = self._guess(logits[row, open_places], generator)
                    kept = confidence.argsort(descending=True, stable=True)[:commits]  # the first of equally sure ones
                    ids[row, begin + open_places[kept]] = guesses[kept]
                    masked[row, begin + open_places[kept]] = False
                done += 1
                if on_step is not None:
                    for row, written in enumerate(ids[:, -count:].tolist()):
                        on_step(first + row, done, written)
        return ids[:, -count:].tolist()

    def _rows(self, prompts: list[list[int]], count: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """(ids B T, positions or None where no row is padded, whether a token is the prompt's B T), padded on the left."""
        device = next(self.model.parameters()).device
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), longest + count), self.mask_id, device=device)
        prompted = torch.zeros_like(ids, dtype=torch.bool)
        place = torch.arange(longest + count, device=device)
        rows = []
        for row, prompt in enumerate(prompts):
            pad = longest - len(prompt)
            ids[row, pad:longest] = torch.tensor(prompt, dtype=ids.dtype, device=device)
            prompted[row, pad:longest] = True
            rows.append(torch.where(place < pad, place, place - pad))
        even = len({len(prompt) for prompt in prompts}) == 1
        return ids, None if even else torch.stack(rows), prompted

    def _logits(self, ids: Tensor, positions: Tensor | None, prompted: Tensor, begin: int, end: int) -> Tensor:
        known = {} if positions is None else {"positions": positions}
        logits = self.model(ids, **known)[:, begin:end]
        if self.guidance == 0:
            return logits
        blind = self.model(ids.masked_fill(prompted, self.mask_id), **known)[:, begin:end]
        return blind.float() + (self.guidance + 1) * (logits.float() - blind.float())

    def _guess(self, logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(ids, confidence) for M places with logits M V, in fp64: in fp32, Gumbel noise cuts off the unlikely tokens."""
        allowed = logits[:, : self.limit].double()
        if not allowed.amax(dim=-1).isfinite().all():
            raise RunError("the model's logits are not finite; its weights are damaged or its training diverged")
        if self.mask_id < self.limit:
            allowed[:, self.mask_id] = float("-inf")
        noisy = allowed
        if self.temperature > 0:
            drawn = torch.rand(allowed.shape, generator=generator, dtype=torch.float64, device="cpu").to(allowed.device)
            noisy = allowed - self.temperature * (-drawn.log()).log()
        guesses = noisy.argmax(dim=-1)
        if self.remasking == "random":
            return guesses, torch.rand(len(guesses), generator=generator, dtype=torch.float64, device="cpu").to(logits.device)
        return guesses, allowed.softmax(dim=-1).gather(1, guesses[:, None]).squeeze(1)
