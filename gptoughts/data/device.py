"""Move batches of numpy arrays to the device; narrow token ids are widened after the copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Copy a batch of arrays or tensors to `device`; unsigned token ids are widened to int64 after the copy."""
    return {key: widen_ids(as_tensor(value).to(device, non_blocking=True)) for key, value in batch.items()}


def as_tensor(value: Any) -> Tensor:
    """Return a tensor that shares the array's memory; a read-only array is copied."""
    if isinstance(value, Tensor):
        return value
    return torch.from_numpy(value if value.flags.writeable else value.copy())


def widen_ids(tensor: Tensor) -> Tensor:
    """Convert uint16 and uint32 ids to int64 for embeddings and cross-entropy; return other tensors unchanged."""
    return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32) else tensor
