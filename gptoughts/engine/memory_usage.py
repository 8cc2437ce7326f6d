"""The most memory that a stretch of work held on the device at one time: from the allocator on a GPU, from the profiler on a CPU."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptoughts.engine.engine import Engine


def held_bytes(engine: Engine) -> int:
    """What is held now: on a GPU all that the allocator has given out, on a CPU weights, gradients and optimizer state, each storage once."""
    if engine.device.type == "cuda":
        return torch.cuda.memory_allocated(engine.device)
    tensors: list[Any] = [*engine.bare.parameters(), *(parameter.grad for parameter in engine.parameters())]
    for state in engine.optimizer.state.values() if engine.optimizer else ():
        tensors += state.values()
    storages = [part.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor) for part in _parts(tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor of a library's own class is made of."""
    inner, _ = tensor.__tensor_flatten__() if hasattr(tensor, "__tensor_flatten__") else ((), None)
    if not inner:
        yield tensor
    for name in inner:
        yield from _parts(getattr(tensor, name))


def highest(before: int, allocations: Iterable[tuple[int, int]]) -> int:
    """The highest sum of bytes from `before` on, over (moment, bytes) pairs in which what is given back is negative."""
    now = most = before
    for _, size in sorted(allocations, key=lambda event: event[0]):
        now += size
        most = max(most, now)
    return most


class Highest:
    """What was held at most; None until the stretch has ended."""

    size: int | None = None


@contextmanager
def measured(engine: Engine) -> Iterator[Highest]:
    """Measure what the block holds at most."""
    found, before = Highest(), held_bytes(engine)
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
        yield found
        found.size = torch.cuda.max_memory_allocated(engine.device)
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its two trace points on standard error are not for the user
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        yield found
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    found.size = highest(before, ((event.start_ns(), event.nbytes()) for event in events))


def resident_bytes(which: str) -> int | None:
    """Return VmRSS (now) or VmHWM (peak) of this process; None on systems without /proc.

    `getrusage` is not used: a child process inherits its parent's peak.
    """
    return proc_bytes(Path("/proc/self/status"), which)


def proc_bytes(file: Path, name: str) -> int | None:
    """Return the value of a `name: N kB` line of a /proc file in bytes; None if there is none."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
