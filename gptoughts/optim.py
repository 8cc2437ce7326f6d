"""Optimiser and schedule: parameter groups that provably cover the model, and the learning rate as a pure function of progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from gptoughts.config import OptimConfig


def groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Two AdamW groups: weights with two or more dimensions decay, the rest do not.

    Every parameter that wants a gradient is in exactly one group; a model without any raises ValueError.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("the model has no parameter that wants a gradient")
    decayed = [parameter for parameter in trained if parameter.dim() >= 2]
    kept = [parameter for parameter in trained if parameter.dim() < 2]
    if len({id(parameter) for parameter in decayed + kept}) != len(trained):
        raise ValueError("a parameter stands in the model twice and would be updated twice")
    made = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in made if group["params"]]


def adamw(model: nn.Module, config: OptimConfig, **implementation: bool) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over `groups`; `implementation` chooses torch's `fused` or `foreach`."""
    return torch.optim.AdamW(
        groups(model, config),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        **implementation,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the learning rate `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate(config: OptimConfig, step: int, done: float, warm: float = 0.0) -> float:
    """The rate of update `step` (from 0) when the share `done` of the run lies behind, of which `warm` was the warm-up.

    Warm-up is linear to the peak over `warmup_steps`. Then cosine and linear fall to `min_learning_rate` at the end, wsd (warm-up,
    stable, decay: Hu et al. 2024) stays and falls linearly over the last `decay_fraction`, constant stays.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    share = min(max((done - warm) / max(1e-12, 1.0 - warm), 0.0), 1.0)
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * _SHAPES[config.schedule](
        share, config
    )


_SHAPES: Mapping[str, Callable[[float, OptimConfig], float]] = {
    "cosine": lambda share, config: 0.5 * (1.0 + math.cos(math.pi * share)),
    "linear": lambda share, config: 1.0 - share,
    "wsd": lambda share, config: min(1.0, (1.0 - share) / config.decay_fraction),
    "constant": lambda share, config: 1.0,
}
