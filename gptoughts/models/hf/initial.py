"""How the weights and buffers of a transformers model begin: its own scheme, read from its own code, as our pure draw.

transformers fills each module with `_init_weights`, which draws in place. Here that runs on tensors without memory under a mode
that writes down what each parameter would have been filled with; the filling itself is then `family.draw`.
"""

from __future__ import annotations

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
from gptoughts.models.torch_internals import buffer_table, initialized, weight_initializer


class _Record(TorchFunctionMode):
    """Writes down the last filling of each tensor and leaves it undone."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[int, tuple[str, tuple[float, ...]]] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, words = getattr(function, "__name__", ""), dict(kwargs or {})
        # Part of a tensor, such as the row of the padding token, is another tensor: the whole one's filling stays on record.
        filled = args[0] if args else words.get("tensor")  # torch.nn.init passes everything by word
        if name.endswith("_") and not name.endswith("__") and isinstance(filled, Tensor):
            said = (*args[1:], *(words[key] for key in ("mean", "std", "value", "val", "a", "b") if key in words))
            self.last[id(filled)] = (name, tuple(float(number) for number in said if isinstance(number, int | float)))
            return filled
        return function(*args, **words)


def scheme(model: PreTrainedModel) -> dict[str, Initial | None]:
    """Name -> how each parameter of `model`, which is on meta, begins; None where that is no normal, ones or zeros."""
    record = _Record()
    with torch.no_grad(), record:
        for module, fill in _in_order(model, weight_initializer(model)):
            fill(module)
    return {name: _initial(record.last.get(id(parameter))) for name, parameter in model.named_parameters()}


def _in_order(module: nn.Module, fill: Callable[[nn.Module], None]) -> Iterator[tuple[nn.Module, Callable[[nn.Module], None]]]:
    """Modules as transformers visits them: children first, a model inside a model by its own scheme."""
    for child in module.children():
        yield from _in_order(child, weight_initializer(child) if isinstance(child, PreTrainedModel) else fill)
    yield module, fill


def _initial(filling: tuple[str, tuple[float, ...]] | None) -> Initial | None:
    match filling:
        case ("normal_", (mean, std)) if mean == 0:
            return Initial("normal", std)
        case ("zero_", _) | ("fill_", (0.0,)):
            return Initial("zeros")
        case ("fill_", (1.0,)):
            return Initial("ones")
    return None


def initial_of(begins: Mapping[str, Initial | None]) -> Callable[[str, Sequence[int], ModelConfig], Initial]:
    """The family's `initial` port. It raises ConfigError for a parameter whose beginning our draw cannot say."""

    def initial(name: str, shape: Sequence[int], config: ModelConfig) -> Initial:
        found = begins.get(name)
        if found is None:
            raise ConfigError(
                f"transformers begins {name} neither normal nor as ones or zeros; take pretrained weights (model.path)"
            )
        return found

    return initial


# --- buffers


def build_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give every buffer memory on `device` and the value that transformers begins it with: rotary frequencies, routing biases.

    Parameters stay as they are. A buffer that transformers leaves as it finds it is told, because it would hold garbage.
    """
    owners = [(module, fill) for module, fill in _in_order(model, weight_initializer(model)) if _buffers(module)]
    twice: list[list[Tensor]] = []
    for garbage in (0, 1):  # what is not written keeps the garbage, which differs between the two rounds
        with torch.no_grad(), _protected(model):
            for module, fill in owners:
                for name, buffer in _buffers(module).items():
                    buffer_table(module)[name] = torch.full_like(buffer, garbage, device=device)
                fill(module)
        twice.append([buffer for module, _ in owners for buffer in _buffers(module).values()])
    names = [name for name, buffer in model.named_buffers() if buffer is not None]
    values = dict(model.named_buffers())
    by_id = {id(values[name]): name for name in names}
    bad = [by_id.get(id(new), "?") for old, new in zip(*twice, strict=True) if not torch.equal(old, new)]
    if bad:
        raise RunError(f"transformers does not say how these buffers begin: {', '.join(bad)}")


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in buffer_table(module).items() if buffer is not None}


@contextmanager
def _protected(model: nn.Module) -> Iterator[None]:
    """Parameters are not drawn again, and torch's generators stay where they are."""
    with initialized(model.parameters()):
        yield
