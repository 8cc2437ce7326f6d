"""What is learned. An objective gives a loss *sum* and its *weight*; their quotient over all micro-batches and ranks is the loss.

The one place that shifts labels is here: batches carry them aligned with `input_ids`, as Hugging Face does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from torch import Tensor, nn

IGNORED = -100
"""Label that counts for nothing, as in torch's cross-entropy."""

Batch = Mapping[str, Tensor]


class Objective(Protocol):
    """The contract of a training objective."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The summed loss of one micro-batch, a scalar that can be differentiated."""

    def weight(self, batch: Batch) -> Tensor | float:
        """What the sum is divided by: usually the number of labels that count."""

    def tokens(self, batch: Batch) -> int:
        """Positions that the model computes, for throughput."""


def preparing(objective: Objective, purpose: Literal["training", "validation"]) -> Callable[..., Any] | None:
    """What an objective does to a batch on the host before it travels, as `(batch, sample positions) -> batch`; None where nothing.

    Objectives that draw, such as masked diffusion, offer `prepare`; with `prepare_validation` the draws of validation are their own.
    """
    own = getattr(objective, "prepare_validation", None) if purpose == "validation" else None
    chosen: Callable[..., Any] | None = own or getattr(objective, "prepare", None)
    return chosen


class NextToken:
    """Predict each token from those before it."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Summed cross-entropy in nats over `input_ids` B T+1 (and `labels` B T+1, where some are ignored).

        `positions` B T+1, where given, restart at 0 with each document of a packed row.
        """
        input_ids = batch["input_ids"]
        labels = batch.get("labels", input_ids)
        packed = {"positions": batch["positions"][:, :-1]} if "positions" in batch else {}
        return model(input_ids[:, :-1], labels=labels[:, 1:], **packed)

    def weight(self, batch: Batch) -> Tensor | float:
        """Number of labels that count."""
        if "labels" in batch:
            return (batch["labels"][:, 1:] != IGNORED).sum().float()
        return float(self.tokens(batch))

    def tokens(self, batch: Batch) -> int:
        """Rows times positions that are predicted, ignored ones included."""
        rows, columns = batch["input_ids"].shape
        return rows * (columns - 1)


class Rows:
    """An objective around a plain function `function(model, batch) -> loss summed over the batch's rows`."""

    def __init__(self, function: Callable[[nn.Module, Batch], Tensor]) -> None:
        self._function = function

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The function's sum."""
        return self._function(model, batch)

    def weight(self, batch: Batch) -> Tensor | float:
        """Number of rows."""
        return float(self.tokens(batch))

    def tokens(self, batch: Batch) -> int:
        """Number of rows."""
        return len(next(iter(batch.values())))


OBJECTIVES: dict[str, type[Objective]] = {"next-token": NextToken}
