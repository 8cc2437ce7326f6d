"""Compare two models on the same text: paired losses per window with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gptoughts.data.device import to_device
from gptoughts.engine.engine import Engine
from gptoughts.engine.objectives.base import IGNORED
from gptoughts.errors import DataError
from gptoughts.models.eager import eager_inference

RESAMPLES = 10_000
MIN_WINDOWS = 10


@dataclass(frozen=True)
class Difference:
    """Mean of (second - first) in nats per token over windows, and the 95 % interval of resampled means."""

    mean: float
    low: float
    high: float
    windows: int


def window_losses(engine: Engine, batches: Iterable[dict[str, Any]]) -> np.ndarray:
    """Return the mean loss of every window in nats per token: float64 (windows,), without windows that have no label."""
    losses = []
    with eager_inference(engine.bare), engine.eval_context():
        for host_batch in batches:
            batch = to_device(host_batch, engine.device)
            input_ids = batch["input_ids"]
            labels = batch.get("labels", input_ids)[:, 1:]
            sums = engine.bare(input_ids[:, :-1], labels=labels, reduction="rows").double()
            counts = (labels != IGNORED).sum(dim=1)
            losses.append((sums / counts)[counts > 0].cpu())
    return torch.cat(losses).numpy()


def difference(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Difference:
    """Return the paired difference with a percentile bootstrap over windows (Efron 1979). Raises DataError for too few windows."""
    if len(first) < MIN_WINDOWS:
        raise DataError(
            f"--length: an interval needs at least {MIN_WINDOWS} windows",
            found=len(first),
            fix="more text, or a smaller --length",
        )
    paired = second - first
    generator = np.random.default_rng(seed)
    drawn = paired[generator.integers(0, len(paired), (RESAMPLES, len(paired)))].mean(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Difference(float(paired.mean()), float(low), float(high), len(paired))
