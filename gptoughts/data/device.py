"""Batches of numpy arrays become tensors on the device: narrow token ids travel, and are widened there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """`batch` on `device`; arrays or tensors, unsigned token ids widened to int64 after the copy."""
    return {key: widened(as_tensor(value).to(device, non_blocking=True)) for key, value in batch.items()}


def as_tensor(value: Any) -> Tensor:
    """A tensor over the same memory where that is possible; a read-only memory map is copied."""
    if isinstance(value, Tensor):
        return value
    return torch.from_numpy(value if value.flags.writeable else value.copy())


def widened(tensor: Tensor) -> Tensor:
    """Unsigned 16- and 32-bit ids as int64, which embeddings and cross-entropy take; anything else as it is."""
    return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32) else tensor
