"""Experts of transformers models under autocast: one grouped product over all of them, in the precision that autocast asks for.

Torch's grouped product is opaque to autocast, so that experts, most of such a model's work, would stay in float32. Here autocast's
rule is applied by hand. Without autocast nothing differs from transformers' own `grouped_mm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations import moe

from gptoughts.models.torch_internals import experts_implementation

NAME = "gptoughts"
THEIRS = "grouped_mm"
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


def use_grouped_product(model: PreTrainedModel) -> None:
    """Let the experts of `model` follow autocast where transformers computes them by its grouped product; others stay as they are."""
    if experts_implementation(model.config) == THEIRS:
        moe.ExpertsInterface.register(NAME, _experts)
        model.set_experts_implementation(NAME)


def _experts(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """hidden N C, chosen N K, weights N K -> N C."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind):
        return moe.grouped_mm_experts_forward(module, hidden, chosen, weights)
    low = torch.get_autocast_dtype(kind)
    return moe.grouped_mm_experts_forward(_Low(module, low), hidden.to(low), chosen, weights)  # type: ignore[arg-type]


class _Low:
    """The module, with its weights in another precision."""

    def __init__(self, module: Any, low: torch.dtype) -> None:
        self._module, self._low = module, low

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._low) if name.startswith(WEIGHTS) else value
