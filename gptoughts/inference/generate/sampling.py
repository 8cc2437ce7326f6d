"""Choosing one token from a row of logits: temperature, top-k, top-p, an explicit generator.

Everything happens on the CPU in fp64 and takes exactly one random number a token, so equal logits and an equal seed
give equal tokens whatever device made the logits, and however many were filtered out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptoughts.errors import ConfigError, RunError


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise ConfigError unless temperature >= 0, top_k >= 0 and 0 < top_p <= 1."""
    if not temperature >= 0:
        raise ConfigError(f"temperature = {temperature} must be 0 (the likeliest token) or more")
    if top_k < 0:
        raise ConfigError(f"top_k = {top_k} must be 0 (every token) or more")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p = {top_p} must be more than 0 and at most 1 (every token)")


def candidates(logits: Tensor, temperature: float, top_k: int, top_p: float, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """(ids, probabilities) that may be drawn from one row of logits (V), likeliest first, equal ones by ascending id.

    Ids from `limit` on (rows that pad the vocabulary) do not take part. Top-k keeps the k likeliest, then top-p the
    fewest of those whose probabilities reach p (Holtzman et al. 2020); at least one stays. Temperature 0 keeps one.
    """
    check_sampling(temperature, top_k, top_p)
    row = logits.detach().to("cpu", torch.float64)[:limit]
    if not row.max().isfinite():
        raise RunError("the model's logits are not finite; its weights are damaged or its training diverged")
    kept = 1 if temperature == 0 else min(top_k or len(row), len(row))
    ids = (row >= row.topk(kept).values[-1]).nonzero().squeeze(1)  # ascending; more than k where the last one is tied
    values, order = row[ids].sort(descending=True, stable=True)
    values, ids = values[:kept], ids[order][:kept]
    if temperature == 0:
        return ids, torch.ones_like(values)
    # Less the largest before the division: a tiny temperature then gives -inf and 0, not inf - inf.
    probabilities = ((values - values[0]) / temperature).softmax(dim=0)
    if top_p < 1:
        before = probabilities.cumsum(dim=0) - probabilities  # what the likelier ones already hold
        probabilities = probabilities[before < top_p]
    return ids[: len(probabilities)], probabilities / probabilities.sum()


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator, limit: int | None = None
) -> int:
    """Draw one id from a row of logits (V) with a CPU `generator`; see `candidates` for what is left in the draw."""
    ids, probabilities = candidates(logits, temperature, top_k, top_p, limit)
    point = torch.rand((), generator=generator, dtype=torch.float64, device="cpu")
    index = int(torch.searchsorted(probabilities.cumsum(dim=0), point, right=True))
    return int(ids[min(index, len(ids) - 1)])
