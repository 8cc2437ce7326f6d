"""The learning rate as a pure function of progress, and writing it to an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gptoughts.config.loader import OptimConfig


def learning_rate(config: OptimConfig, step: int, done: float, warm: float = 0.0) -> float:
    """Return the learning rate of update `step`, counted from 0.

    done  fraction of the run before this update
    warm  fraction of the run that is warmup

    Warmup is linear over `warmup_steps`. Afterwards cosine and linear decay to `min_learning_rate` at the end, wsd (warmup, stable,
    decay: Hu et al. 2024) is constant and decays linearly over the last `decay_fraction`, constant is constant.
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


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group; a rate that an optimizer holds in a tensor is written to that tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
