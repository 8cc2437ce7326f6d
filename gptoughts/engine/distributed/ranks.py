"""Collectives over ranks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gptoughts.errors import RunError
from gptoughts.hardware.world import World


@dataclass(frozen=True)
class Ranks:
    """Collective operations of this rank. With one process none communicates."""

    world: World
    device: torch.device

    @property
    def size(self) -> int:
        """World size."""
        return self.world.world_size

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files."""
        return self.world.rank == 0

    def sum(self, value: Tensor | float) -> Tensor:
        """Return the sum over ranks, on the device; the host does not wait."""
        total = value.detach().clone() if isinstance(value, Tensor) else torch.full((), float(value), device=self.device)
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is True on any rank. The host waits."""
        if self.size == 1:
            return flag
        return bool(self.sum(float(flag)).item() > 0)

    def largest(self, value: float) -> float:
        """Return the maximum over ranks. The host waits."""
        if self.size == 1:
            return value
        most = torch.full((), value, dtype=torch.float64, device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return float(most)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return a CPU tensor of every rank, equal in shape, in the order of ranks. The host waits."""
        if self.size == 1:
            return [tensor]
        mine = tensor.to(self.device)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine)
        return [one.cpu() for one in found]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            self.sum(0.0).item()

    def same(self, what: str, text: str) -> None:
        """Raise RunError on every rank unless `text` is the same on all. `what` names it in the message."""
        if self.size == 1:
            return
        digest = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)  # 48 bits are exact in float64
        mine = torch.full((), digest, dtype=torch.float64, device=self.device)
        least, most = mine.clone(), mine.clone()
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        if least.item() != most.item():
            raise RunError(f"{what}: differs between ranks", found=f"on rank {self.world.rank}:\n{text}")


class Vote:
    """Any-reduction whose result is read one step later, so that the host does not wait for the device."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._asked: tuple[Tensor, torch.cuda.Event | None] | None = None

    def heard(self, mine: bool) -> bool:
        """Start this step's reduction. Returns the result of the step before, the same on every rank."""
        total = self._ranks.sum(float(mine))
        before, answer = self._asked, total.to("cpu", non_blocking=True)
        arrived = None
        if total.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self._asked = (answer, arrived)
        if before is None:
            return False
        if before[1] is not None:
            before[1].synchronize()
        return bool(before[0].item() > 0)
