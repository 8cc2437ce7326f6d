"""The state of a run between steps, and the result of one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

DATA_WAIT, FORWARD, BACKWARD, OPTIMIZER, COMMUNICATION, OTHER = (
    "data_wait",
    "forward",
    "backward",
    "optimizer",
    "communication",
    "other",
)
PARTS = (DATA_WAIT, FORWARD, BACKWARD, OPTIMIZER, COMMUNICATION, OTHER)
"""Parts of a step, as `Engine.mark` names them. Each lasts until the next mark, so together they are the step."""
END = "end"
"""The mark at the end of a step."""


@dataclass(frozen=True)
class Progress:
    """Progress of a run: all that the loop needs to resume."""

    step: int = 0
    """Updates of the weights, and steps that `train.bad_step = "skip"` left without one."""
    tokens: int = 0
    """Tokens consumed, over all ranks."""
    seconds: float = 0.0
    """Time spent in steps; callbacks are not counted."""
    cursor: Any = None
    """Position in the data order to resume from."""


@dataclass(frozen=True)
class StepStats:
    """Results of one step. Tensors stay on the device, so that the host does not wait."""

    loss_sum: Tensor
    """Summed loss, over all ranks."""
    weight: Tensor
    """Weight of the loss, over all ranks."""
    grad_norm: Tensor
    updated: bool
    """Whether the step counts as an update. A bad one that `train.bad_step = "skip"` leaves out counts, and changes no weight."""
    tokens: int
    cursor: Any
    rate: float
    batch: Mapping[str, Tensor] | None = None
    """This rank's share of the global batch."""
