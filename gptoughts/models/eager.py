"""Evaluation mode for generation and evaluation: no gradients, no compiled blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eager_inference(model: nn.Module) -> Iterator[None]:
    """Run the block with `model` in evaluation mode, without gradients, and eager: torch.compile would recompile for each length."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(training)
