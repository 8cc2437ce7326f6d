"""Sources of parameter values that fill a newly allocated model."""

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
        """Return the full value of the parameter `name`, or None if this source has none."""

    def buffer(self, name: str) -> Tensor | None:
        """Return the value of the persistent buffer `name`, or None to keep the one built with the model."""

    def unused(self) -> list[str]:
        """Return stored names that were never read."""


def shape_of(tensor: Tensor) -> torch.Size:
    """Return the shape of the whole tensor, also of a ZeRO-3 parameter, which is empty between uses."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


class Initialization:
    """Initial weights: a pure function of (seed, native name, full shape), the same on every rank."""

    def __init__(self, family: Family, config: ModelConfig, seed: int) -> None:
        self._family, self._config, self._seed = family, config, seed

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return the initial value of the parameter `name`."""
        assert self._family.initial is not None
        return draw(self._seed, name, shape, self._family.initial(name, shape, self._config))

    def buffer(self, name: str) -> Tensor | None:
        """Return None: buffers stay as built."""
        return None

    def unused(self) -> list[str]:
        """Return an empty list: values are drawn on demand."""
        return []


class CurrentWeights:
    """Current parameter values of a user's own model."""

    def __init__(self, model: nn.Module) -> None:
        self._values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return the copied value of the parameter `name`."""
        return self._values.get(name)

    def buffer(self, name: str) -> Tensor | None:
        """Return None: buffers stay as built."""
        return None

    def unused(self) -> list[str]:
        """Return an empty list."""
        return []


def meta_model(recipe: Recipe, family: Family, rows: int) -> nn.Module:
    """Build the recipe's model on meta with `rows` embedding rows."""
    with on_meta():
        return family.build(recipe.model, rows, recipe.data.sequence_length)
