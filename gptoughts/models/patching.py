"""Sends a module's forward elsewhere while its parameters, names and place stay. Every cut returns its undo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gptoughts.models.torch_internals import parameter_table

Undo = Callable[[], None]


def reroute(module: nn.Module, forward: Callable[..., Any]) -> Undo:
    """Call `forward` instead of the module's own. Set on the instance, so class, parameters and keys on disk are untouched."""
    had = module.__dict__.get("forward")
    module.__dict__["forward"] = forward

    def undo() -> None:
        if had is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = had

    return undo


def pass_through(hidden: Tensor) -> Tensor:
    """The forward of a module whose work another one does now."""
    return hidden


def share(target: nn.Module, names: dict[str, nn.Parameter | None]) -> None:
    """Let `target` compute with parameters that another module owns."""
    for name, parameter in names.items():
        parameter_table(target)[name] = parameter
