"""Replace a module's forward on the instance; its parameters and names stay. Each patch returns its undo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gptoughts.models.torch_internals import parameter_table

Undo = Callable[[], None]


def reroute(module: nn.Module, forward: Callable[..., Any]) -> Undo:
    """Call `forward` instead of the module's own. Set on the instance: class, parameters and checkpoint keys do not change."""
    previous = module.__dict__.get("forward")
    module.__dict__["forward"] = forward

    def undo() -> None:
        if previous is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = previous

    return undo


def pass_through(hidden: Tensor) -> Tensor:
    """Return the input: the forward of a module that a fused module replaces."""
    return hidden


def share(target: nn.Module, names: dict[str, nn.Parameter | None]) -> None:
    """Register parameters of another module in `target`, without copying them."""
    for name, parameter in names.items():
        parameter_table(target)[name] = parameter
