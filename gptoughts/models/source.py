"""Where the values of parameters come from, as whoever allocates a model asks for them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Source(Protocol):
    """Initialisation, a checkpoint, a pretrained folder, or an adapter over one of them."""

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """The full value of the parameter `name`, or None where this source has none."""

    def buffer(self, name: str) -> Tensor | None:
        """The value of the persistent buffer `name`, or None where this source leaves it as it was built."""

    def unused(self) -> list[str]:
        """Names that the source holds and nobody asked for."""
