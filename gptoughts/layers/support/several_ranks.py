"""Requirements, memory and proofs that layers for several ranks share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from gptoughts.planning.layer import Budget, Case, Engine, Reason, unsupported

GATHERED_BLOCKS = 2
"""Blocks whose weights exist at the same time: the one that computes, and the next one."""


def gathered_bytes(case: Case, budget: Budget, block_value_bytes: int) -> int:
    """Return the bytes of gathered weights: the blocks in use, and embedding and head in float32."""
    values = budget.weights // 4
    outside = min(values, case.spec.embedding_parameters or 0)
    block = (values - outside) / max(1, budget.depth)
    return int(outside * 4 + GATHERED_BLOCKS * block * block_value_bytes)


def autocasts_to_bf16(engine: Engine) -> bool:
    """Return whether forwards run under bfloat16 autocast."""
    import torch

    kind = engine.device.type
    with engine.forward_context():
        return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16


def outside_host_memory(tensors: Iterable[Any]) -> str:
    """Return what is wrong with `tensors` of a layer that keeps them in host memory; an empty text if all are there."""
    elsewhere = [tensor.device.type for tensor in tensors if tensor.device.type != "cpu"]
    return f"{len(elsewhere)} tensors lie on {elsewhere[0]}, not in host memory" if elsewhere else ""


def rank_reasons(case: Case, least: int = 2) -> Iterator[Reason]:
    """Yield reasons against fewer than `least` ranks, and against a global batch that the ranks do not divide."""
    ranks, batch = case.world.world_size, case.recipe.train.global_batch
    if ranks < least:
        yield unsupported("needs more than one process", remedy="gptoughts train ... --ranks N")
    elif batch % ranks:
        below = batch // ranks * ranks
        near = f"{below} or {below + ranks}" if below else f"{ranks}"
        yield unsupported(
            f"train.global_batch = {batch} is not divisible by {ranks} ranks",
            remedy=f"--train.global-batch {near}, or {_fewer(case)}",
        )


def _fewer(case: Case) -> str:
    """Return the flag for the most ranks that divide the global batch."""
    batch = case.recipe.train.global_batch
    most = next(ranks for ranks in range(case.world.world_size, 0, -1) if batch % ranks == 0)
    return f"--gpus {most}" if case.on_gpu and most <= case.world.local_world_size else f"--ranks {most}"
