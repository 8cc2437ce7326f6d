"""Parameter groups that provably cover the model, AdamW, and the learning rate as a pure function of progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gptoughts.config.loader import OptimConfig
from gptoughts.errors import ConfigError

GROUP_STATE = ("step", "k", "weight_sum", "lr_max", "scheduled_lr", "train_mode")
"""Values that optimizers keep per group and change as they go. Everything else in a group is the recipe's."""

Group = dict[str, Any]


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter that wants a gradient, once. Raises ConfigError where there is none, or one in half precision."""
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise ConfigError("the model has no parameter that wants a gradient; nothing could be trained")
    half = [name for name, parameter in model.named_parameters() if parameter.requires_grad and _is_half(parameter)]
    if half:
        raise ConfigError(
            f"{len(half)} of {len(found)} trained parameters are not float32, first {half[0]} "
            f"({_dtype(model.get_parameter(half[0]))}): updates smaller than half a unit in the last place would be lost\n"
            "  try: weights in float32 (model.float()); --layer.precision bf16 computes in bfloat16 beside them"
        )
    return found


def _is_half(parameter: nn.Parameter) -> bool:
    return parameter.dtype not in (torch.float32, torch.float64)


def _dtype(parameter: nn.Parameter) -> str:
    return str(parameter.dtype).removeprefix("torch.")


def groups(model: nn.Module, config: OptimConfig) -> list[Group]:
    """Two groups: weights with two or more dimensions decay, the rest do not.

    Every parameter that wants a gradient is in exactly one group; a model without any raises ConfigError.
    """
    return by_decay(trained(model), config)


def by_decay(parameters: Iterable[nn.Parameter], config: OptimConfig) -> list[Group]:
    """`parameters` in at most two groups, as in `groups`."""
    parameters = list(parameters)
    decayed = [parameter for parameter in parameters if parameter.dim() >= 2]
    kept = [parameter for parameter in parameters if parameter.dim() < 2]
    made = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in made if group["params"]]


def adamw(model: nn.Module, config: OptimConfig, **implementation: bool) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over `groups`; `implementation` chooses torch's `fused` or `foreach`."""
    return adamw_over(groups(model, config), config, **implementation)


def adamw_over(made: list[Group], config: OptimConfig, **implementation: bool) -> torch.optim.AdamW:
    """AdamW over groups that are made already."""
    return torch.optim.AdamW(
        made,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        **implementation,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the learning rate `rate`, in the tensor where an optimizer holds its rate in one."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def step_one(optimizer: torch.optim.Optimizer, group: Group, parameter: Tensor) -> None:
    """Update `parameter` alone, by the settings of `group`. For optimizers that keep no count per group (`GROUP_STATE`)."""
    groups = optimizer.param_groups
    optimizer.param_groups = [{**group, "params": [parameter]}]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups


@runtime_checkable
class KeepsItsOwn(Protocol):
    """An optimizer whose state is not made of plain tensors beside the weights, and which says how it is kept and taken back."""

    made_by: str
    """The name of what made the state: only the same can take it back."""

    def stored(self, parameter: Tensor) -> dict[str, Any]:
        """The state of `parameter` as plain tensors and numbers."""

    def take(self, parameter: Tensor, values: Mapping[str, Any]) -> None:
        """Take back what `stored` gave. Raises CheckpointError where it does not fit."""


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
