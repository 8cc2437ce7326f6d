"""Training objectives. An objective returns a loss *sum* and its *weight*; their quotient over all micro-batches and ranks is the loss.

Batches carry labels aligned with `input_ids`, as in Hugging Face; the shift for next-token prediction is done here.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn

IGNORED = -100
"""Label that is ignored, as in torch's cross-entropy."""

Batch = Mapping[str, Tensor]
HostBatch = dict[str, Any]
Listing = tuple[Tensor, Callable[[Sequence[float]], dict[str, Any]]]


class Objective(ABC):
    """Base class of training objectives. The three abstract methods are required; subclasses need not call `super().__init__`."""

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the summed loss of one micro-batch, a differentiable scalar."""

    @abstractmethod
    def weight(self, batch: Batch) -> Tensor | float:
        """Return the divisor of the sum, usually the number of labels that are not ignored."""

    @abstractmethod
    def tokens(self, batch: Batch) -> int:
        """Return the number of positions that the model computes, for throughput."""

    def label_weight(self, batch: Batch) -> Tensor | float | None:
        """Return the sum of the labels' weights in the loss, each a cross-entropy over the vocabulary; None for another loss.

        Times ln V it is the loss sum of a model that predicts every token alike.
        """
        return None

    @cached_property
    def meters(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Extra metrics by name: a sum and a weight on the device. Logging divides and zeroes them."""
        return {}

    def prepare(self, batch: HostBatch, samples: np.ndarray) -> HostBatch:
        """Transform a training batch on the host. `samples` (rows,): positions in the endless stream of samples, for random draws."""
        return batch

    def prepare_validation(self, batch: HostBatch, samples: np.ndarray) -> HostBatch:
        """Transform a validation batch on the host. `samples` count from 0 at each validation."""
        return self.prepare(batch, samples)

    def forget(self) -> None:  # noqa: B027  # optional
        """Drop state collected since the last update: its batch is computed again, or was not a training batch."""

    def listing(self) -> Listing | None:
        """Return a vector on the device and a function from its values to entries of metrics.jsonl, since the last call; or None."""
        return None


class NextToken(Objective):
    """Next-token prediction.

    one_document    each row holds one document and padding after it, which no token of it sees in a causal model. The model then gets no
                    positions, so that it need not keep documents apart.
    """

    def __init__(self, one_document: bool = False) -> None:
        self.one_document = one_document

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return summed cross-entropy in nats over `input_ids` (B, T+1) and, where some are ignored, `labels` (B, T+1).

        Optional `positions` (B, T+1) restart at 0 with each document of a packed row.
        """
        input_ids = batch["input_ids"]
        labels = batch.get("labels", input_ids)
        packed = {"positions": batch["positions"][:, :-1]} if "positions" in batch and not self.one_document else {}
        return model(input_ids[:, :-1], labels=labels[:, 1:], **packed)

    def weight(self, batch: Batch) -> Tensor | float:
        """Return the number of labels that are not ignored."""
        if "labels" in batch:
            return (batch["labels"][:, 1:] != IGNORED).sum().float()
        return float(self.tokens(batch))

    def label_weight(self, batch: Batch) -> Tensor | float | None:
        """Return the number of labels: each weighs 1."""
        return self.weight(batch)

    def tokens(self, batch: Batch) -> int:
        """Return rows times predicted positions, ignored ones included."""
        rows, columns = batch["input_ids"].shape
        return rows * (columns - 1)


class Rows(Objective):
    """Objective of a plain function `function(model, batch) -> loss summed over the batch's rows`."""

    def __init__(self, function: Callable[[nn.Module, Batch], Tensor]) -> None:
        self._function = function

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the function's sum."""
        return self._function(model, batch)

    def weight(self, batch: Batch) -> Tensor | float:
        """Return the number of rows."""
        return float(self.tokens(batch))

    def tokens(self, batch: Batch) -> int:
        """Return the number of rows."""
        return len(next(iter(batch.values())))


class WrappedObjective(Objective):
    """Objective around another one; every method calls the inner one. Base class for overriding some of them."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    @property
    def meters(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The inner objective's meters."""
        return self.objective.meters

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the inner objective's sum."""
        return self.objective(model, batch)

    def weight(self, batch: Batch) -> Tensor | float:
        """Return the inner objective's weight."""
        return self.objective.weight(batch)

    def label_weight(self, batch: Batch) -> Tensor | float | None:
        """Return the inner objective's label weight."""
        return self.objective.label_weight(batch)

    def tokens(self, batch: Batch) -> int:
        """Return the inner objective's tokens."""
        return self.objective.tokens(batch)

    def prepare(self, batch: HostBatch, samples: np.ndarray) -> HostBatch:
        """Call the inner objective's `prepare`."""
        return self.objective.prepare(batch, samples)

    def prepare_validation(self, batch: HostBatch, samples: np.ndarray) -> HostBatch:
        """Call the inner objective's `prepare_validation`."""
        return self.objective.prepare_validation(batch, samples)

    def forget(self) -> None:
        """Call the inner objective's `forget`."""
        self.objective.forget()

    def listing(self) -> Listing | None:
        """Return the inner objective's listing."""
        return self.objective.listing()


class _Adapted(Objective):
    """Objective of an object that has `__call__`, `weight` and `tokens`, perhaps optional methods, and another base class."""

    def __init__(self, given: Any) -> None:
        self._given = given
        self._own_meters: dict[str, tuple[Tensor, Tensor]] = {}
        for name in ("label_weight", "prepare", "prepare_validation", "forget", "listing"):
            if callable(method := getattr(given, name, None)):
                setattr(self, name, method)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._given(model, batch)

    def weight(self, batch: Batch) -> Tensor | float:
        return self._given.weight(batch)

    def tokens(self, batch: Batch) -> int:
        return self._given.tokens(batch)

    @property
    def meters(self) -> dict[str, tuple[Tensor, Tensor]]:  # the object may assign a new dict
        given = getattr(self._given, "meters", None)
        return self._own_meters if given is None else given

    def __copy__(self) -> _Adapted:
        return _Adapted(copy.copy(self._given))


def as_objective(given: Any) -> Objective | None:
    """Return `given` as an Objective: itself, or adapted where it only has `__call__`, `weight` and `tokens`; None for anything else."""
    if isinstance(given, Objective):
        return given
    if isinstance(given, type) or not all(callable(getattr(given, name, None)) for name in ("__call__", "weight", "tokens")):
        return None
    return _Adapted(given)


def next_token(recipe: Any, tokenizer: Any, mask_id: int | None) -> Objective:
    """Return the objective of the task `next-token`."""
    return NextToken(one_document=not recipe.data.packing)
