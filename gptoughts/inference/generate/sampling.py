"""Sample one token from a row of logits: temperature, top-k, top-p, explicit generator.

Runs on the CPU in fp64 with exactly one random number per token, so equal logits and seed give equal tokens on any device and for
any filters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptoughts.errors import ConfigError, RunError


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise ConfigError unless temperature >= 0, top_k >= 0 and 0 < top_p <= 1."""
    if not temperature >= 0:
        raise ConfigError("--temperature: must be 0 (greedy) or more", found=temperature)
    if top_k < 0:
        raise ConfigError("--top-k: must be 0 (off) or more", found=top_k)
    if not 0 < top_p <= 1:
        raise ConfigError("--top-p: must be above 0 and at most 1 (off)", found=top_p)


def candidates(logits: Tensor, temperature: float, top_k: int, top_p: float, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the (ids, probabilities) to sample from for one row of logits (V): most likely first, ties by ascending id.

    Ids from `limit` on (vocabulary padding) are excluded. Top-k keeps the k most likely, then top-p the fewest of those whose
    probabilities sum to p (Holtzman et al. 2020), at least one. Temperature 0 keeps one.
    """
    check_sampling(temperature, top_k, top_p)
    row = logits.detach().to("cpu", torch.float64)[:limit]
    if not row.max().isfinite():
        raise RunError("model: logits are not finite; damaged weights or diverged training")
    kept = 1 if temperature == 0 else min(top_k or len(row), len(row))
    ids = (row >= row.topk(kept).values[-1]).nonzero().squeeze(1)  # ascending; more than k if the last is tied
    values, order = row[ids].sort(descending=True, stable=True)
    values, ids = values[:kept], ids[order][:kept]
    if temperature == 0:
        return ids, torch.ones_like(values)
    # Subtract the maximum before dividing: a tiny temperature then gives -inf and 0, not inf - inf.
    probabilities = ((values - values[0]) / temperature).softmax(dim=0)
    if top_p < 1:
        before = probabilities.cumsum(dim=0) - probabilities  # cumulative probability of more likely ids
        probabilities = probabilities[before < top_p]
    return ids[: len(probabilities)], probabilities / probabilities.sum()


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator, limit: int | None = None
) -> int:
    """Draw one id from the `candidates` of a row of logits (V) with a CPU `generator`."""
    ids, probabilities = candidates(logits, temperature, top_k, top_p, limit)
    point = torch.rand((), generator=generator, dtype=torch.float64, device="cpu")
    index = int(torch.searchsorted(probabilities.cumsum(dim=0), point, right=True))
    return int(ids[min(index, len(ids) - 1)])
