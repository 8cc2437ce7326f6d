"""Where the values of parameters come from, as whoever allocates a model asks for them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from gptoughts.config.loader import ModelConfig, Recipe
from gptoughts.models.family import Family, draw
from gptoughts.models.meta import on_meta


class Source(Protocol):
    """Initialization, a checkpoint, a pretrained folder, or an adapter over one of them."""

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """The full value of the parameter `name`, or None where this source has none."""

    def buffer(self, name: str) -> Tensor | None:
        """The value of the persistent buffer `name`, or None where this source leaves it as it was built."""

    def unused(self) -> list[str]:
        """Names that the source holds and nobody asked for."""


class Initialization:
    """Fresh weights: a pure function of (seed, native name, full shape), the same on every rank."""

    def __init__(self, family: Family, config: ModelConfig, seed: int) -> None:
        self._family, self._config, self._seed = family, config, seed

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """The first value of the parameter `name`."""
        assert self._family.initial is not None
        return draw(self._seed, name, shape, self._family.initial(name, shape, self._config))

    def buffer(self, name: str) -> Tensor | None:
        """Buffers stay as they were built."""
        return None

    def unused(self) -> list[str]:
        """Nothing is left over: values are drawn when asked for."""
        return []


class AsTheyAre:
    """A user's own model: its parameters keep the values that they have."""

    def __init__(self, model: nn.Module) -> None:
        self._values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """The value that the parameter had."""
        return self._values.get(name)

    def buffer(self, name: str) -> Tensor | None:
        """Buffers stay as they were built."""
        return None

    def unused(self) -> list[str]:
        """Nothing is left over."""
        return []


def meta_model(recipe: Recipe, family: Family, rows: int) -> nn.Module:
    """The recipe's model without memory, over `rows` embedding rows."""
    with on_meta():
        return family.build(recipe.model, rows, recipe.data.sequence_length)
