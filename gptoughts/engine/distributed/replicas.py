"""Compare the weights that every rank holds whole. Ranks that differ train on in silence otherwise."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

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
    whole = {name: weight.data for name, weight in engine.bare.named_parameters() if local(weight) is weight}
    if not whole:
        return
    mine = torch.stack([_checksum(weight) for weight in whole.values()])
    least, most = mine.clone(), mine.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    differ = [name for name, equal in zip(whole, (least == most).tolist(), strict=True) if not equal]
    if differ:
        names = ", ".join(differ[:3]) + (", ..." if len(differ) > 3 else "")
        raise RunError(
            f"weights: {len(differ)} of {len(whole)} differ between ranks, so they no longer train one model",
            found=names,
            fix="--resume with an earlier checkpoint; gptoughts doctor, which tests memory and links of this machine",
        )


def _checksum(weight: Tensor) -> Tensor:
    return weight.view(BITS[weight.element_size()]).sum(dtype=torch.int64)
