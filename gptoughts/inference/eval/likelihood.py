"""Monte Carlo upper bound on the negative log-likelihood of a text under masked diffusion, in nats.

For a text of L tokens, k is drawn from 1 to L, k tokens are masked, and their summed cross-entropy is divided by k / L. The mean
over draws estimates the negative log-likelihood averaged over all generation orders (Nie et al. 2025, LLaDA, equation 6; Ou et al.
2024), with far less variance than masking each token independently. For one token it is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gptoughts.data.order import round_keys
from gptoughts.engine.objectives.base import IGNORED
from gptoughts.engine.objectives.masked_diffusion import uniform
from gptoughts.errors import ConfigError, DataError
from gptoughts.models.eager import eager_inference

DRAWS = 128
ROWS = 16
COUNTS, PLACES = 3, 4  # random streams; training and validation use the lower numbers


@dataclass(frozen=True)
class Bound:
    """Upper bound on the nats of a number of tokens, with the standard error of the estimate."""

    nats: float
    standard_error: float
    tokens: int

    def per(self, count: int) -> tuple[float, float]:
        """Return (nats, standard error) per unit, for a `count` of tokens, characters or bytes."""
        return self.nats / count, self.standard_error / count


def mask_counts(length: int, draws: int, seed: int, text: int) -> np.ndarray:
    """Return the number of masked tokens per draw: evenly spaced over 1 to `length` from one random start, int64 (draws,).

    Systematic sampling: each count is uniform, so the estimate is unbiased, and together they cover the range.
    """
    start = uniform(seed, COUNTS, np.array([text]), 0, 1)[0, 0]
    fractions = (start + np.arange(draws) / draws) % 1.0
    return 1 + np.minimum((fractions * length).astype(np.int64), length - 1)


def masks(length: int, draws: int, seed: int, text: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (masks, bool (draws, length); counts, int64 (draws,)). A pure function of its arguments."""
    counts = mask_counts(length, draws, seed, text)
    first = round_keys(seed, text)[:1].astype(np.int64)  # first draw of this text's own stream
    scores = uniform(seed, PLACES, first + np.arange(draws), 0, length)
    rank = scores.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return rank < counts[:, None], counts


def bound(
    model: Any,
    target: Sequence[int],
    mask_id: int,
    *,
    prompt: Sequence[int] = (),
    draws: int = DRAWS,
    seed: int = 0,
    text: int = 0,
    rows: int = ROWS,
) -> Bound:
    """Return the bound on -log p(target | prompt) from `draws` maskings, `rows` per forward.

    Equal (seed, text, length, draws) give equal masks, so compared texts can share them. The standard error assumes independent
    draws; they are evenly spaced, so the true one is smaller.
    Raises ConfigError for fewer than two draws, DataError for an empty target, a too long text, and a mask in the text.
    """
    if draws < 2:
        raise ConfigError("draws: must be at least 2, for a standard error", found=draws)
    ids, length = np.array([*prompt, *target], dtype=np.int64), len(target)
    if not length:
        raise DataError("text: no tokens to evaluate")
    if len(ids) > model.sequence_length:
        raise DataError(f"text: longer than the model's sequence_length of {model.sequence_length}", found=f"{len(ids)} tokens")
    if (ids == mask_id).any():
        raise DataError(f"text: contains the mask token {mask_id}")
    draws = 1 if length == 1 else draws  # one token has one mask
    chosen, counts = masks(length, draws, seed, text)
    masked = np.concatenate([np.zeros((draws, len(prompt)), dtype=bool), chosen], axis=1)
    device = next(model.parameters()).device
    input_ids = torch.from_numpy(np.where(masked, mask_id, ids))
    labels = torch.from_numpy(np.where(masked, ids, IGNORED))
    sums = []
    with eager_inference(model):
        for inputs, targets in zip(input_ids.split(rows), labels.split(rows), strict=True):
            sums.append(model(inputs.to(device), labels=targets.to(device), reduction="rows").double().cpu())
    nats = torch.cat(sums).numpy() * (length / counts)
    error = 0.0 if length == 1 else float(nats.std(ddof=1) / math.sqrt(draws))
    return Bound(float(nats.mean()), error, length)


def text_bound(
    model: Any,
    ids: Sequence[int],
    mask_id: int,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    window: int | None = None,
    limit: int | None = None,
    rows: int = ROWS,
) -> Bound:
    """Return the bound on the nats of a text, cut into independent windows of `window` tokens (default: the context length).

    `limit`: number of windows, spread evenly over the text; `tokens` counts only those. `per(bound.tokens)` gives nats per token,
    and without a limit `per(len(characters))` nats per character. Raises like `bound`.
    """
    size = model.sequence_length if window is None else window
    if size < 1 or (limit is not None and limit < 1):
        raise ConfigError("window, limit: must be at least 1", found=f"window {size}, limit {limit}")
    if not len(ids):
        raise DataError("text: no tokens to evaluate")
    windows = -(-len(ids) // size)
    taken = windows if limit is None else min(limit, windows)
    numbers = [index * windows // taken for index in range(taken)]
    parts = [
        bound(model, ids[number * size : (number + 1) * size], mask_id, draws=draws, seed=seed, text=number, rows=rows)
        for number in numbers
    ]
    error = math.sqrt(sum(part.standard_error**2 for part in parts))
    return Bound(sum(part.nats for part in parts), error, sum(part.tokens for part in parts))
