"""Around the reading of a model by whoever writes or measures text: evaluation mode, no gradients, blocks as they were written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eager_reading(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and eager blocks: each new length would otherwise be compiled once more."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(training)
