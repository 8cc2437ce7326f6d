"""Initialization of a transformers model's weights and buffers, derived from its own `_init_weights`.

transformers initializes each module in place. Here `_init_weights` runs on meta tensors under a mode that records the fill of each
parameter; the values are then drawn by `family.draw`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from gptoughts.config.loader import ModelConfig
from gptoughts.errors import ConfigError, RunError
from gptoughts.models.family import Initial
from gptoughts.models.meta import on_meta
from gptoughts.models.torch_internals import buffer_table, initialized, weight_initializer


class _FillRecorder(TorchFunctionMode):
    """Record the last in-place fill of each tensor without executing it."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[int, tuple[str, tuple[float, ...]]] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, keywords = getattr(function, "__name__", ""), dict(kwargs or {})
        # A slice, such as the row of the padding token, is another tensor, so the record of the full one is kept.
        filled = args[0] if args else keywords.get("tensor")  # torch.nn.init passes keyword arguments
        if name.endswith("_") and not name.endswith("__") and isinstance(filled, Tensor):
            values = (*args[1:], *(keywords[key] for key in ("mean", "std", "value", "val", "a", "b") if key in keywords))
            self.last[id(filled)] = (name, tuple(float(value) for value in values if isinstance(value, int | float)))
            return filled
        return function(*args, **keywords)


def scheme(model: PreTrainedModel) -> dict[str, Initial | None]:
    """Return name -> initialization of each parameter of `model`, which is on meta; None for other fills than normal, ones, zeros."""
    record = _FillRecorder()
    with torch.no_grad(), record:
        for module, fill in _in_order(model, weight_initializer(model)):
            fill(module)
    return {name: _initial(record.last.get(id(parameter))) for name, parameter in model.named_parameters()}


def _in_order(module: nn.Module, fill: Callable[[nn.Module], None]) -> Iterator[tuple[nn.Module, Callable[[nn.Module], None]]]:
    """Yield modules in transformers' order, children first, with the `_init_weights` of the enclosing model."""
    for child in module.children():
        yield from _in_order(child, weight_initializer(child) if isinstance(child, PreTrainedModel) else fill)
    yield module, fill


def _initial(fill: tuple[str, tuple[float, ...]] | None) -> Initial | None:
    match fill:
        case ("normal_", (mean, std)) if mean == 0:
            return Initial("normal", std)
        case ("zero_", _) | ("fill_", (0.0,)):
            return Initial("zeros")
        case ("fill_", (1.0,)):
            return Initial("ones")
    return None


def initial_of(initials: Mapping[str, Initial | None]) -> Callable[[str, Sequence[int], ModelConfig], Initial]:
    """Return the function `Family.initial`, which raises ConfigError for parameters with an unsupported initialization."""

    def initial(name: str, shape: Sequence[int], config: ModelConfig) -> Initial:
        found = initials.get(name)
        if found is None:
            problem = f"{name}: transformers' initialization is not normal, ones or zeros"
            raise ConfigError(problem, fix="pretrained weights (--model.path)")
        return found

    return initial


# --- buffers

VALUE_MAKERS = ("tensor", "arange", "zeros", "ones", "full", "linspace", "eye")
"""torch's functions that make tensors of known values."""


class _RealValues(TorchFunctionMode):
    """Make tensors of known values on the CPU inside `on_meta`, where their values would be lost."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        if getattr(function, "__name__", "") in VALUE_MAKERS and keywords.get("device") is None:
            keywords["device"] = "cpu"
        return function(*args, **keywords)


def _constructed(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the buffers that the constructor of `model` fills, by name; none if it mixes them with parameters on meta."""
    try:
        with on_meta(), _RealValues():
            again = type(model)(copy.deepcopy(model.config))
    except (RuntimeError, TypeError, ValueError, NotImplementedError):  # an operation on both devices
        return {}
    return {name: buffer for name, buffer in again.named_buffers() if not buffer.is_meta}


def build_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Allocate every buffer on `device` with transformers' initial value: rotary frequencies, routing biases.

    Buffers that only the constructor fills get its values. Parameters do not change. Raises RunError for others.
    """
    owners = [(module, fill) for module, fill in _in_order(model, weight_initializer(model)) if _buffers(module)]
    rounds: list[list[Tensor]] = []
    for filler in (0, 1):  # uninitialized elements keep the filler and so differ between the two rounds
        with torch.no_grad(), _protected(model):
            for module, fill in owners:
                for name, buffer in _buffers(module).items():
                    buffer_table(module)[name] = torch.full_like(buffer, filler, device=device)
                fill(module)
        rounds.append([buffer for module, _ in owners for buffer in _buffers(module).values()])
    unfilled = {id(new) for old, new in zip(*rounds, strict=True) if not torch.equal(old, new)}
    values = _constructed(model) if unfilled else {}
    uninitialized = []
    for name, buffer in model.named_buffers():
        if id(buffer) in unfilled and name in values and values[name].shape == buffer.shape:
            buffer.copy_(values[name])
        elif id(buffer) in unfilled:
            uninitialized.append(name)
    if uninitialized:
        raise RunError(f"model: transformers does not initialize these buffers: {', '.join(uninitialized)}")


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in buffer_table(module).items() if buffer is not None}


@contextmanager
def _protected(model: nn.Module) -> Iterator[None]:
    """Mark parameters as initialized, so that they and torch's random generators do not change."""
    with initialized(model.parameters()):
        yield
