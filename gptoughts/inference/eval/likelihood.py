"""How likely masked diffusion finds a text: an upper bound on its nats, by Monte Carlo with a fixed number of masks a draw.

For a text of L tokens, k is drawn from 1 to L, k of its tokens are masked, and their summed cross-entropy is divided by k / L.
The mean over draws estimates the negative log-likelihood averaged over all orders in which tokens could be written (Nie et al. 2025,
LLaDA, equation 6; Ou et al. 2024). It varies far less than masking each token for itself. A text of one token is exact.
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
from gptoughts.models.eager import eager_reading

DRAWS = 128
ROWS = 16
COUNTS, PLACES = 3, 4  # streams of draws; training and validation have the first two


@dataclass(frozen=True)
class Bound:
    """An upper bound on the nats of some tokens, with the standard error of its estimate."""

    nats: float
    standard_error: float
    tokens: int

    def per(self, count: int) -> tuple[float, float]:
        """(nats, standard error) per each of `count`: tokens, characters, bytes."""
        return self.nats / count, self.standard_error / count


def mask_counts(length: int, draws: int, seed: int, text: int) -> np.ndarray:
    """How many of `length` tokens each draw masks: evenly spread over 1 to `length` from one random start, int64 (draws,).

    Each is by itself uniform over the range, so the estimate is unbiased; together they cover the range (systematic sampling).
    """
    start = uniform(seed, COUNTS, np.array([text]), 0, 1)[0, 0]
    places = (start + np.arange(draws) / draws) % 1.0
    return 1 + np.minimum((places * length).astype(np.int64), length - 1)


def masks(length: int, draws: int, seed: int, text: int) -> tuple[np.ndarray, np.ndarray]:
    """(which tokens each draw masks, bool draws x length; how many, int64 draws). A pure function of its arguments."""
    counts = mask_counts(length, draws, seed, text)
    own = round_keys(seed, text)[:1].astype(np.int64)  # a stream for each text: its draws are counted from here
    scores = uniform(seed, PLACES, own + np.arange(draws), 0, length)
    rank = scores.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return rank < counts[:, None], counts


def bound(
    model: Any,
    target: Sequence[int],
    mask_id: int,
    prompt: Sequence[int] = (),
    draws: int = DRAWS,
    seed: int = 0,
    text: int = 0,
    rows: int = ROWS,
) -> Bound:
    """The bound on -log p(target | prompt) from `draws` maskings, `rows` of them per forward.

    The same (seed, text, length, draws) give the same masks, so texts that are compared can share them. The standard error
    takes draws for independent; they are spread evenly, so the true one is smaller.
    Raises ConfigError for fewer than two draws, DataError for nothing to predict, more than the context, and a mask in the text.
    """
    if draws < 2:
        raise ConfigError(f"draws = {draws} must be at least 2: the spread of one is not known")
    ids, length = np.array([*prompt, *target], dtype=np.int64), len(target)
    if not length:
        raise DataError("there is no token whose likelihood could be asked for")
    if len(ids) > model.sequence_length:
        raise DataError(f"{len(ids)} tokens are more than the model's sequence_length of {model.sequence_length}")
    if (ids == mask_id).any():
        raise DataError(f"the text holds the mask itself, token {mask_id}")
    draws = 1 if length == 1 else draws  # one token can be masked in one way
    chosen, counts = masks(length, draws, seed, text)
    masked = np.concatenate([np.zeros((draws, len(prompt)), dtype=bool), chosen], axis=1)
    device = next(model.parameters()).device
    input_ids = torch.from_numpy(np.where(masked, mask_id, ids))
    labels = torch.from_numpy(np.where(masked, ids, IGNORED))
    sums = []
    with eager_reading(model):
        for some, aims in zip(input_ids.split(rows), labels.split(rows), strict=True):
            sums.append(model(some.to(device), labels=aims.to(device), reduction="rows").double().cpu())
    nats = torch.cat(sums).numpy() * (length / counts)
    error = 0.0 if length == 1 else float(nats.std(ddof=1) / math.sqrt(draws))
    return Bound(float(nats.mean()), error, length)


def text_bound(
    model: Any,
    ids: Sequence[int],
    mask_id: int,
    draws: int = DRAWS,
    seed: int = 0,
    window: int | None = None,
    limit: int | None = None,
    rows: int = ROWS,
) -> Bound:
    """The bound on the nats of a text, cut into windows of `window` tokens (the context, if not set) that do not see each other.

    `limit` takes that many windows, spread over the text; `tokens` are those of the windows taken. `per(bound.tokens)` are nats
    per token, of a text that was taken whole `per(len(characters))` per character. Raises as `bound` does.
    """
    size = model.sequence_length if window is None else window
    if size < 1 or (limit is not None and limit < 1):
        raise ConfigError(f"window = {size} tokens, limit = {limit}: both must be at least 1")
    if not len(ids):
        raise DataError("there is no token whose likelihood could be asked for")
    windows = -(-len(ids) // size)
    taken = windows if limit is None else min(limit, windows)
    numbers = [index * windows // taken for index in range(taken)]
    parts = [
        bound(model, ids[number * size : (number + 1) * size], mask_id, (), draws, seed, number, rows) for number in numbers
    ]
    error = math.sqrt(sum(part.standard_error**2 for part in parts))
    return Bound(sum(part.nats for part in parts), error, sum(part.tokens for part in parts))
