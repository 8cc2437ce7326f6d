"""Parameter groups that cover the model, and AdamW over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gptoughts.config.loader import OptimConfig
from gptoughts.errors import ConfigError
from gptoughts.models.sources import shape_of

GROUP_STATE = ("step", "k", "weight_sum", "lr_max", "scheduled_lr", "train_mode")
"""Per-group values that optimizers change. All other values in a group come from the recipe."""

Group = dict[str, Any]


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters, each once. Raises ConfigError if there is none, or one in half precision."""
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise ConfigError("model: no parameter has requires_grad, so there is nothing to train")
    half = [name for name, parameter in model.named_parameters() if parameter.requires_grad and _is_half(parameter)]
    if half:
        raise ConfigError(
            f"{half[0]}: {len(half)} of {len(found)} trained parameters are not float32, which loses updates below their rounding step",
            found=_dtype(model.get_parameter(half[0])),
            fix="model.float(); --layer.precision bf16 computes in bfloat16 with float32 weights",
        )
    return found


def _is_half(parameter: nn.Parameter) -> bool:
    return parameter.dtype not in (torch.float32, torch.float64)


def _dtype(parameter: nn.Parameter) -> str:
    return str(parameter.dtype).removeprefix("torch.")


def groups(model: nn.Module, config: OptimConfig) -> list[Group]:
    """Return two groups: with weight decay for parameters of two or more dimensions, without for the others.

    Each trainable parameter is in exactly one group; a model without any raises ConfigError.
    """
    return by_decay(trained(model), config)


def by_decay(parameters: Iterable[nn.Parameter], config: OptimConfig) -> list[Group]:
    """Split `parameters` into at most two groups, as in `groups`."""
    parameters = list(parameters)
    decayed = [parameter for parameter in parameters if len(shape_of(parameter)) >= 2]
    kept = [parameter for parameter in parameters if len(shape_of(parameter)) < 2]
    made = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in made if group["params"]]


def adamw(model: nn.Module, config: OptimConfig, **implementation: bool) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov and Hutter 2019) over `groups`; `implementation` sets torch's `fused` or `foreach`."""
    return adamw_over(groups(model, config), config, **implementation)


def adamw_over(made: list[Group], config: OptimConfig, **implementation: bool) -> torch.optim.AdamW:
    """Build AdamW over existing groups."""
    return torch.optim.AdamW(
        made,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        **implementation,
    )


def step_one(optimizer: torch.optim.Optimizer, group: Group, parameter: Tensor) -> None:
    """Update only `parameter`, with the settings of `group`. For optimizers without per-group state (`GROUP_STATE`)."""
    groups = optimizer.param_groups
    optimizer.param_groups = [{**group, "params": [parameter]}]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups


@runtime_checkable
class CustomStateOptimizer(Protocol):
    """Optimizer with its own state format, such as 8-bit codes or state on the host, which it converts for checkpoints."""

    made_by: str
    """Name of the implementation; only the same one can restore the state."""

    def stored(self, parameter: Tensor) -> dict[str, Any]:
        """Return the state of `parameter` as plain tensors and numbers."""

    def take(self, parameter: Tensor, values: Mapping[str, Any]) -> None:
        """Restore what `stored` returned. Raises CheckpointError where it does not match."""
