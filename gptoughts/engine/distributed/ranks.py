"""Collectives over ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gptoughts.errors import RunError, ToldElsewhere
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

    def same(self, what: str, text: str, shown: str = "") -> None:
        """Raise on every rank unless `text` is the same on all: RunError with all values on rank 0, ToldElsewhere on the others.

        `what` names it in the message; `shown` is printed instead of a text that is a digest.
        """
        if self.size == 1:
            return
        digest = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)  # 48 bits are exact in float64
        mine = torch.full((), digest, dtype=torch.float64, device=self.device)
        least, most = mine.clone(), mine.clone()
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        if least.item() == most.item():
            return
        texts = self.texts(f"{digest}\n{shown or text}")
        raise differing(what, texts) if self.first else ToldElsewhere

    def texts(self, text: str) -> list[str]:
        """Return the text of every rank, in rank order. The host waits."""
        if self.size == 1:
            return [text]
        content = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        longest = int(self.largest(float(len(content))))
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)  # no text of ours holds a zero byte
        padded[: len(content)] = content
        found = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(found, padded)
        return [bytes(other.cpu().tolist()).rstrip(b"\0").decode() for other in found]


def differing(what: str, texts: Sequence[str]) -> RunError:
    """Return the error for texts that differ, one per rank, each with a first line that identifies it.

    Shows the two most common values and which ranks have which.
    """
    ranks: dict[str, list[int]] = {}
    shown: dict[str, str] = {}
    for rank, text in enumerate(texts):
        key, _, value = text.partition("\n")
        ranks.setdefault(key, []).append(rank)
        shown.setdefault(key, value)
    (first, others), *rest = sorted(ranks.items(), key=lambda item: (-len(item[1]), item[1]))
    values = [(_ranks(others), shown[first]), (_ranks(rest[0][1]), shown[rest[0][0]])]
    lines = [f"{where}:\n{value}" if "\n" in value else f"{where}: {value}" for where, value in values]
    more = f"\n{len(rest) - 1} more values on other ranks" if len(rest) > 1 else ""
    return RunError(f"{what}: differs between ranks", found="\n".join(["", *lines]) + more)


def _ranks(ranks: Sequence[int]) -> str:
    some = ", ".join(map(str, ranks[:8]))
    return f"on rank{'s' if len(ranks) > 1 else ''} {some}{f' and {len(ranks) - 8} others' if len(ranks) > 8 else ''}"


class Vote:
    """Any-reduction of two flags whose result is read one step later, so that the host does not wait for the device."""

    SECOND = 4096.0
    """Value of the second flag in the sum: exact in float32 for fewer ranks than this."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._asked: tuple[Tensor, torch.cuda.Event | None] | None = None

    def heard(self, mine: bool) -> bool:
        """Start this step's reduction of one flag. Returns the result of the step before, the same on every rank."""
        return self.both(mine, False)[0]

    def both(self, first: bool, second: bool) -> tuple[bool, bool]:
        """Start this step's reduction of two flags. Returns the results of the step before, the same on every rank."""
        total = self._ranks.sum(float(first) + self.SECOND * float(second))
        before, answer = self._asked, total.to("cpu", non_blocking=True)
        arrived = None
        if total.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self._asked = (answer, arrived)
        if before is None:
            return False, False
        if before[1] is not None:
            before[1].synchronize()
        seconds, firsts = divmod(float(before[0].item()), self.SECOND)
        return firsts > 0, seconds > 0
