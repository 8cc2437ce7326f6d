"""Time calls that are too short for the clock."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

MOST_CALLS = 1000


def timed(work: Callable[[], Any], device: torch.device, seconds: float, repetitions: int) -> list[float]:
    """Return seconds per call of `work` for each repetition, the mean over as many calls as take about `seconds`.

    Warm-up calls come first. A GPU is synchronized before and after a repetition, not between its calls.
    """
    work()
    calls = max(1, min(MOST_CALLS, round(seconds / max(_seconds(work, 1, device), 1e-7))))
    _seconds(work, min(calls, 3), device)
    return [_seconds(work, calls, device) / calls for _ in range(repetitions)]


def _seconds(work: Callable[[], Any], calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = perf_counter()
    for _ in range(calls):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - began
