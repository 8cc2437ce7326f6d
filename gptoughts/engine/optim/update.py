"""One update of an optimizer that a bad step leaves out: weights, moments and counters keep every bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def update(optimizer: torch.optim.Optimizer, usable: Tensor | None) -> None:
    """Run one update, and none where `usable`, a scalar on the device, is False. None always updates.

    The fused AdamW decides on the device, as for torch's gradient scaler. For every other optimizer the host reads the scalar.
    """
    if usable is None:
        optimizer.step()
    elif is_fused(optimizer):
        _update_fused(optimizer, usable)
    elif bool(usable):
        optimizer.step()


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether torch's fused kernels update all parameters, which take a flag that prevents the update."""
    adam = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
    return adam and all(group.get("fused") for group in optimizer.param_groups)


def _update_fused(optimizer: Any, usable: Tensor) -> None:
    optimizer.grad_scale, optimizer.found_inf = None, (~usable).float()
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf
