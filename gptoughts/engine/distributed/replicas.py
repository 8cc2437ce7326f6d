"""Compare the weights of which several ranks hold a copy. Ranks that differ train on in silence otherwise."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.distributed.rendezvous import ranges
from gptoughts.engine.distributed.shards import local, part_of
from gptoughts.engine.engine import Engine
from gptoughts.errors import RunError

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def demand_equal_weights(engine: Engine) -> None:
    """Raise RunError on every rank if a copy of a weight differs between ranks: whole weights, and shards that groups replicate.

    A weight's checksum is the sum of its bits as integers, exact in any order. The host waits.
    """
    if engine.ranks.size == 1:
        return
    weights = {name: weight.data for name, weight in engine.bare.named_parameters()}
    # After a forward without a backward FSDP2 holds the outermost weights whole, so that both kinds exist at once.
    whole = {name: weight for name, weight in weights.items() if not isinstance(weight, DTensor) and local(weight) is weight}
    shards = {
        name: weight for name, weight in weights.items() if isinstance(weight, DTensor) and _dimension(weight) is not None
    }
    for copied, group in ((whole, None), (shards, _replicas(shards))):
        if copied:
            _demand_equal(engine.ranks, copied, group)


def _demand_equal(ranks: Ranks, copied: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Compare copies within `group`, None for all ranks, and raise on every rank. A collective of all ranks."""
    mine = torch.stack([_checksum(local(weight)) for weight in copied.values()])
    least, most = mine.clone(), mine.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    equal = (least == most).long()
    if group is not None:
        dist.all_reduce(equal, op=dist.ReduceOp.MIN)
    differ = [name for name, same in zip(copied, equal.tolist(), strict=True) if not same]
    if differ:
        first = list(copied).index(differ[0])
        raise RunError(
            f"weights: {len(differ)} of {len(copied)} differ between ranks, so they no longer train one model",
            found=f"{differ[0]}: {_apart(ranks, copied[differ[0]], mine[first])}",
            fix="--resume with an earlier checkpoint; gptoughts doctor, which tests memory and links of this machine",
        )


def _dimension(weight: DTensor) -> int | None:
    """Return the dimension of the mesh over which a sharded weight is replicated; None for shards that exist once."""
    return next((number for number, placement in enumerate(weight.placements) if placement.is_replicate()), None)


def _replicas(shards: Mapping[str, DTensor]) -> dist.ProcessGroup | None:
    """Return the group of ranks that hold the same shards as this one; None without shards."""
    for weight in shards.values():
        return weight.device_mesh.get_group(_dimension(weight))
    return None


def _apart(ranks: Ranks, weight: Tensor, checksum: Tensor) -> str:
    """Return which ranks hold equal copies, as `ranks 0-2 | rank 3`. A collective."""
    part = part_of(weight)
    start = torch.full_like(checksum, part.start if part is not None else 0)
    alike: dict[int, dict[int, list[int]]] = {}
    for rank, pair in enumerate(ranks.gather(torch.stack([start, checksum]))):
        place, value = pair.tolist()
        alike.setdefault(place, {}).setdefault(value, []).append(rank)
    apart = next(held for held in alike.values() if len(held) > 1)
    return " | ".join(map(ranges, sorted(apart.values(), key=lambda some: (-len(some), some))))


def _checksum(weight: Tensor) -> Tensor:
    return weight.view(BITS[weight.element_size()]).sum(dtype=torch.int64)
