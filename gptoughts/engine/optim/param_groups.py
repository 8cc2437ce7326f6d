"""Parameter groups that cover the model, and AdamW over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
