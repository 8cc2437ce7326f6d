"""Masked-diffusion generation: mask tokens after the prompt are replaced over a number of steps, most confident first.

The reverse process of Nie et al. 2025 (LLaDA). Tokens are never remasked; optional blocks are finished from left to right. Attention
is bidirectional, so there is no cache and each step runs the whole row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor

from gptoughts.errors import ConfigError, DataError, RunError
from gptoughts.inference.generate.autoregressive import Prompt, Tokenizer, continuation
from gptoughts.models.eager import eager_inference

Remasking = Literal["low-confidence", "random"]
OnStep = Callable[[int, int, list[int]], None]
"""on_step(prompt index, steps done, new ids so far, `mask_id` at open positions)."""

ROWS = 16


@dataclass(frozen=True)
class Schedule:
    """Number of tokens committed per step of a block."""

    block_length: int
    commits: tuple[int, ...]
    """Per step of a block, without steps that commit nothing."""


def schedule(max_new_tokens: int, steps: int, block_length: int | None = None) -> Schedule:
    """Split each block's tokens evenly over its steps; the remainder goes to the first steps.

    `block_length` None is one block. With more steps than tokens, each step commits one token and the others are dropped.
    Raises ConfigError, with the nearest valid values, if blocks do not divide the tokens or the steps.
    """
    length = max_new_tokens if block_length is None else block_length
    for name, value in (("max_new_tokens", max_new_tokens), ("steps", steps), ("block_length", length)):
        if value < 1:
            raise ConfigError(f"{name}: must be at least 1", found=value)
    if max_new_tokens % length:
        valid = [number for number in range(1, max_new_tokens + 1) if max_new_tokens % number == 0]
        raise ConfigError(
            f"block_length: must divide the {max_new_tokens} new tokens",
            found=length,
            fix=f"block_length {_nearest(valid, length)}",
        )
    blocks = max_new_tokens // length
    if steps % blocks:
        valid = [blocks * number for number in range(1, steps // blocks + 2)]
        raise ConfigError(
            f"steps: must be a multiple of {blocks} blocks ({max_new_tokens} new tokens / block_length {length})",
            found=steps,
            fix=f"steps {_nearest(valid, steps)}",
        )
    each, remainder = divmod(length, steps // blocks)
    commits = [each + (step < remainder) for step in range(steps // blocks)]
    return Schedule(length, tuple(count for count in commits if count))


def _nearest(valid: list[int], value: int) -> str:
    below, above = max((n for n in valid if n < value), default=None), min((n for n in valid if n > value), default=None)
    return " or ".join(str(number) for number in (below, above) if number is not None)


def check(
    max_new_tokens: int,
    steps: int,
    block_length: int | None,
    *,
    remasking: str,
    temperature: float,
    guidance: float,
    sequence_length: int,
) -> Schedule:
    """Return the schedule for valid settings. Raises ConfigError otherwise; also used as a pre-flight check."""
    steps_per_block = schedule(max_new_tokens, steps, block_length)
    if remasking not in ("low-confidence", "random"):
        raise ConfigError("--remasking: must be low-confidence or random", found=repr(remasking))
    if not temperature >= 0:
        raise ConfigError("--temperature: must be 0 (greedy) or more", found=temperature)
    if not guidance >= 0:
        raise ConfigError("--guidance: must be 0 (off) or more", found=guidance)
    if max_new_tokens > sequence_length:
        raise ConfigError(
            f"max_new_tokens: must be at most the model's sequence_length {sequence_length}", found=max_new_tokens
        )
    return steps_per_block


def generate(
    model: Any,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    mask_id: int,
    max_new_tokens: int = 128,
    steps: int = 128,
    *,
    block_length: int | None = None,
    remasking: Remasking = "low-confidence",
    temperature: float = 0.0,
    guidance: float = 0.0,
    seed: int = 0,
    stop_at_eot: bool = True,
    on_step: OnStep | None = None,
    stops: Collection[int] = (),
) -> list[Prompt]:
    """Generate `max_new_tokens` after each prompt in `steps` steps; returns the new tokens, as text or ids like the prompts.

    `model` is a bidirectional GPT, or a module with its call signature, `sequence_length` and `vocab_size`.

    Each step predicts every masked token of the block (Gumbel noise in fp64 on the logits, scaled by `temperature`; 0 is greedy)
    and commits the most confident predictions: by probability before noise, or by a random score if `remasking` is "random".
    `guidance` s moves the logits away from the unconditional ones: u + (s + 1) (c - u) (Ho and Salimans 2022).
    The mask and ids that pad the vocabulary are never generated. With `stop_at_eot`, text ends before the first end-of-text, as it
    does before the ids in `stops`.

    A prompt keeps its last tokens if it and the new tokens exceed the context. The result depends on `seed` and not on other
    prompts: each has its own generator, and padding of shorter prompts is masked. (Exact ties, such as between the masks after an
    empty prompt, are decided by rounding.)
    Raises ConfigError for settings out of range, DataError for ids outside the vocabulary.
    """
    length, rows = model.sequence_length, model.vocab_size
    commit_schedule = check(
        max_new_tokens, steps, block_length,
        remasking=remasking, temperature=temperature, guidance=guidance, sequence_length=length,
    )  # fmt: skip
    if getattr(model, "causal", False):
        raise ConfigError("model: causal, cannot fill masks", fix="autoregressive generation")
    limit = min(tokenizer.vocab_size, rows)
    if not 0 <= mask_id < rows:
        raise ConfigError(f"mask_id: must be below the model's {rows} embedding rows", found=mask_id)
    sampler = _Sampler(model, mask_id, limit, commit_schedule, remasking, temperature, guidance)
    room = length - max_new_tokens
    starts = [ids[max(0, len(ids) - room) :] for ids in (_prompt_ids(tokenizer, prompt, limit, mask_id) for prompt in prompts)]
    results: list[Any] = []
    with eager_inference(model):
        for first in range(0, len(starts), ROWS):
            results += sampler.generate(starts[first : first + ROWS], max_new_tokens, seed, first, on_step)
    ends = {*stops, *([tokenizer.eot_id] if stop_at_eot else [])}
    results = [list(takewhile(lambda token: token not in ends, ids)) for ids in results]
    if prompts and isinstance(prompts[0], str):
        results = [continuation(tokenizer, start, ids) for start, ids in zip(starts, results, strict=True)]
    return results


def _prompt_ids(tokenizer: Tokenizer, prompt: str | Sequence[int], limit: int, mask_id: int) -> list[int]:
    ids = [int(token) for token in (tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)]
    outside = [token for token in ids if not 0 <= token < limit or token == mask_id]
    if outside:
        reason = "must not be the mask" if outside[0] == mask_id else f"must be below the vocabulary size {limit}"
        raise DataError(f"prompt: token ids {reason}", found=outside[0])
    return ids


@dataclass(frozen=True)
class _Sampler:
    """The reverse process over a batch of prompts."""

    model: Any
    mask_id: int
    limit: int
    """Ids from this one on pad the vocabulary."""
    schedule: Schedule
    remasking: Remasking
    temperature: float
    guidance: float

    def generate(self, prompts: list[list[int]], count: int, seed: int, first: int, on_step: OnStep | None) -> list[list[int]]:
        """Return `count` new ids for each prompt. `first`: index of the first prompt, for `on_step`."""
        ids, positions, is_prompt = self._rows(prompts, count)
        generators = [torch.Generator("cpu").manual_seed(seed) for _ in prompts]
        masked = torch.zeros_like(ids, dtype=torch.bool)
        masked[:, -count:] = True
        done = 0
        for begin in range(ids.shape[1] - count, ids.shape[1], self.schedule.block_length):
            end = begin + self.schedule.block_length
            for commits in self.schedule.commits:
                logits = self._logits(ids, positions, is_prompt, begin, end)  # B block V
                for row, generator in enumerate(generators):
                    open_positions = masked[row, begin:end].nonzero().squeeze(1)
                    predicted, confidence = self._predict(logits[row, open_positions], generator)
                    committed = confidence.argsort(descending=True, stable=True)[:commits]  # ties: leftmost first
                    ids[row, begin + open_positions[committed]] = predicted[committed]
                    masked[row, begin + open_positions[committed]] = False
                done += 1
                if on_step is not None:
                    for row, new_ids in enumerate(ids[:, -count:].tolist()):
                        on_step(first + row, done, new_ids)
        return ids[:, -count:].tolist()

    def _rows(self, prompts: list[list[int]], count: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return left-padded (ids B T, positions B T or None if no row is padded, prompt mask B T)."""
        device = next(self.model.parameters()).device
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), longest + count), self.mask_id, device=device)
        is_prompt = torch.zeros_like(ids, dtype=torch.bool)
        index = torch.arange(longest + count, device=device)
        rows = []
        for row, prompt in enumerate(prompts):
            pad = longest - len(prompt)
            ids[row, pad:longest] = torch.tensor(prompt, dtype=ids.dtype, device=device)
            is_prompt[row, pad:longest] = True
            rows.append(torch.where(index < pad, index, index - pad))
        even = len({len(prompt) for prompt in prompts}) == 1
        return ids, None if even else torch.stack(rows), is_prompt

    def _logits(self, ids: Tensor, positions: Tensor | None, is_prompt: Tensor, begin: int, end: int) -> Tensor:
        kwargs = {} if positions is None else {"positions": positions}
        logits = self.model(ids, **kwargs)[:, begin:end]
        if self.guidance == 0:
            return logits
        unconditional = self.model(ids.masked_fill(is_prompt, self.mask_id), **kwargs)[:, begin:end].float()
        return unconditional + (self.guidance + 1) * (logits.float() - unconditional)

    def _predict(self, logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return (ids, confidence) for M positions with logits M V, in fp64: in fp32, Gumbel noise truncates unlikely tokens."""
        allowed = logits[:, : self.limit].double()
        if not allowed.amax(dim=-1).isfinite().all():
            raise RunError("model: logits are not finite; damaged weights or diverged training")
        if self.mask_id < self.limit:
            allowed[:, self.mask_id] = float("-inf")
        noisy = allowed
        if self.temperature > 0:
            noise = torch.rand(allowed.shape, generator=generator, dtype=torch.float64, device="cpu").to(allowed.device)
            noisy = allowed - self.temperature * (-noise.log()).log()
        predicted = noisy.argmax(dim=-1)
        if self.remasking == "random":
            return predicted, torch.rand(len(predicted), generator=generator, dtype=torch.float64, device="cpu").to(
                logits.device
            )
        return predicted, allowed.softmax(dim=-1).gather(1, predicted[:, None]).squeeze(1)
