"""The paired comparison of two models: losses window by window are the model's own, and the interval covers what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gptoughts.errors import DataError
from gptoughts.inference.eval.comparison import difference, window_losses
from gptoughts.inference.eval.perplexity import mean_loss
from tests.support.engines import engine_of, plan_of, random_batches, recipe_of


@pytest.mark.parametrize("family", ["modern", "llama"])
def test_window_losses_are_those_of_the_whole(family: str) -> None:
    recipe = recipe_of(family)
    batches = [batch for batch, _ in zip((b for b, _ in random_batches(recipe, ragged=True)), range(3), strict=False)]
    with engine_of(recipe, plan_of(recipe)) as engine:
        found = window_losses(engine, batches)
        whole, labels = mean_loss(engine, batches)
    counts = torch.cat([(batch["labels"][:, 1:] != -100).sum(dim=1) for batch in batches]).numpy()
    assert len(found) == 12 and labels == counts.sum()
    assert abs((found * counts).sum() / counts.sum() - whole) < 1e-6


def test_the_interval_covers_and_narrows() -> None:
    generator = np.random.default_rng(7)
    covered = 0
    for seed in range(60):
        first = generator.normal(3.0, 1.0, 80)
        found = difference(first, first + generator.normal(-0.1, 0.2, 80), seed)
        covered += found.low <= -0.1 <= found.high
        assert found.low < found.mean < found.high
    assert covered >= 50
    # Windows differ by ten times what the models do; pairing takes that out.
    assert found.high - found.low < 0.12


def test_too_few_windows() -> None:
    with pytest.raises(DataError, match=r"an interval needs at least 10 windows\. Found 9"):
        difference(np.zeros(9), np.zeros(9))
