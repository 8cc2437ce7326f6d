"""Apply autocast to the experts of transformers models, which are computed by one grouped matmul.

Autocast does not cover torch's grouped matmul, so experts, most of such a model's compute, would stay in float32. Here inputs and
weights are cast explicitly. Without autocast the result equals transformers' `grouped_mm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations import moe

from gptoughts.models.torch_internals import experts_implementation

NAME = "gptoughts"
GROUPED_MM = "grouped_mm"
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


def use_autocast_experts(model: PreTrainedModel) -> None:
    """Make the experts of `model` follow autocast if transformers computes them by its grouped matmul."""
    if experts_implementation(model.config) == GROUPED_MM:
        moe.ExpertsInterface.register(NAME, _experts)
        model.set_experts_implementation(NAME)


def _experts(module: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """hidden N C, indices N K, weights N K -> N C."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return moe.grouped_mm_experts_forward(module, hidden, indices, weights)
    low = torch.get_autocast_dtype(kind)
    return moe.grouped_mm_experts_forward(_CastWeights(module, low), hidden.to(low), indices, weights)  # type: ignore[arg-type]


class _CastWeights:
    """View of a module with its expert weights in another dtype."""

    def __init__(self, module: Any, low: torch.dtype) -> None:
        self._module, self._low = module, low

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._low) if name.startswith(WEIGHTS) else value
