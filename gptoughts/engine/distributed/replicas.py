"""Compare the weights that every rank holds whole. Ranks that differ train on in silence otherwise."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.distributed.rendezvous import ranges
from gptoughts.engine.distributed.shards import local
from gptoughts.engine.engine import Engine
from gptoughts.errors import RunError

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def demand_equal_weights(engine: Engine) -> None:
    """Raise RunError on every rank if a replicated weight differs between ranks. Sharded weights are left out.

    A weight's checksum is the sum of its bits as integers, exact in any order. The host waits.
    """
    if engine.ranks.size == 1:
        return
    copied = {name: weight.data for name, weight in engine.bare.named_parameters() if _has_copies(weight)}
    if not copied:
        return
    mine = torch.stack([_checksum(local(weight)) for weight in copied.values()])
    least, most = mine.clone(), mine.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    differ = [name for name, same in zip(copied, (least == most).tolist(), strict=True) if not same]
    if differ:
        first = list(copied).index(differ[0])
        raise RunError(
            f"weights: {len(differ)} of {len(copied)} differ between ranks, so they no longer train one model",
            found=f"{differ[0]}: {_apart(engine.ranks, mine[first])}",
            fix="--resume with an earlier checkpoint; gptoughts doctor, which tests memory and links of this machine",
        )


def _has_copies(weight: Tensor) -> bool:
    if isinstance(weight, DTensor):
        return False
    return local(weight) is weight


def _apart(ranks: Ranks, checksum: Tensor) -> str:
    """Return which ranks hold equal copies, as `ranks 0-2 | rank 3`. A collective."""
    alike: dict[int, list[int]] = {}
    for rank, value in enumerate(ranks.gather(checksum.reshape(1))):
        alike.setdefault(int(value), []).append(rank)
    return " | ".join(map(ranges, sorted(alike.values(), key=lambda some: (-len(some), some))))


def _checksum(weight: Tensor) -> Tensor:
    return weight.view(BITS[weight.element_size()]).sum(dtype=torch.int64)
