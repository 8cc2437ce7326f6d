"""Parts of sharded tensors: which elements this rank holds, and copying whole tensors in.

A part is a contiguous range of the flattened tensor. FSDP2 (DTensor) shards the first dimension, so each rank holds whole rows. ZeRO-3
divides the flattened tensor, padded to equal ranges: the parameter itself is empty between uses, its attribute `ds_tensor` is this
rank's range and `ds_shape` the shape of the whole. A tensor that is not sharded is its own only part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from gptoughts.errors import RunError
from gptoughts.models.sources import shape_of


@dataclass(frozen=True)
class Part:
    """Elements of a sharded tensor on this rank."""

    value: Tensor
    """The elements, in any shape; empty where the tensor has fewer rows than there are ranks."""
    start: int
    """Position of the first one in the flattened tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    is_first_copy: bool = True
    """False where another group of ranks, which replicates this one, holds the same elements."""


def is_sharded(model: nn.Module) -> bool:
    """Return whether any parameter is sharded over ranks."""
    return any(local(parameter) is not parameter for parameter in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """Return the elements on this rank, sharing memory with `tensor`; of a ZeRO-3 parameter with its padding."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    partition: Tensor | None = getattr(tensor, "ds_tensor", None)
    return tensor if partition is None else partition


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor, or the sum of partial ones, on every rank: a collective if it is sharded."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    partition = local(tensor)
    if partition is tensor:
        return tensor
    ranges = [torch.empty_like(partition) for _ in range(dist.get_world_size())]
    dist.all_gather(ranges, partition)
    shape = shape_of(tensor)
    return torch.cat(ranges)[: shape.numel()].view(shape)


@contextmanager
def gathered_outside_blocks(model: nn.Module) -> Iterator[None]:
    """Hold sharded embedding, head and last norm whole, so that modules inside `model` can be called without its own forward.

    A collective; blocks gather their weights themselves.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def part_of(tensor: Tensor | Part) -> Part | None:
    """Return this rank's part of a sharded tensor; None if it is not sharded. Raises RunError for other layouts than rows."""
    if isinstance(tensor, Part):
        return tensor
    if not isinstance(tensor, DTensor):
        return _zero_part(tensor)
    shape, value = tuple(tensor.shape), tensor.to_local()
    mesh, rows, first_copy = tensor.device_mesh, range(shape[0] if shape else 1), True
    for dimension, placement in enumerate(tensor.placements):
        ranks, mine = mesh.size(dimension), mesh.get_local_rank(dimension)
        if isinstance(placement, Shard) and placement.dim == 0 and shape:
            per_rank = -(-len(rows) // ranks)  # as torch.chunk splits them
            rows = rows[min(mine * per_rank, len(rows)) : min((mine + 1) * per_rank, len(rows))]
        elif placement.is_replicate():
            first_copy = first_copy and mine == 0
        else:
            raise RunError("sharded tensor: only shards of the first dimension are supported", found=str(placement))
    if value.numel() != len(rows) * prod(shape[1:]):
        raise RunError(
            "sharded tensor: the part of this rank has another size than its layout says", found=f"{tuple(value.shape)}"
        )
    return Part(value, rows.start * prod(shape[1:]), shape, first_copy)


def _zero_part(tensor: Tensor) -> Part | None:
    partition, shape = local(tensor), shape_of(tensor)
    if partition is tensor:
        return None
    start = min(dist.get_rank() * partition.numel(), shape.numel())
    return Part(partition[: min(partition.numel(), shape.numel() - start)], start, tuple(shape))


def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy `value`, a whole tensor, into `tensor`, or this rank's part of it."""
    part = part_of(tensor)
    if part is None:
        tensor.copy_(value)
    else:
        part.value.copy_(_range(value, part).view(part.value.shape))


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """Return `value`, a whole tensor, sharded and placed as `tensor` is, in its own dtype."""
    part = part_of(tensor)
    if part is None:
        return value.to(tensor.device)
    assert isinstance(tensor, DTensor)
    mine = _range(value, part).clone().view(part.value.shape).to(part.value.device)
    return DTensor.from_local(
        mine, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _range(value: Tensor, part: Part) -> Tensor:
    return value.reshape(-1)[part.start : part.start + part.value.numel()]


def held_bytes(tensors: Sequence[Tensor]) -> tuple[int, int]:
    """Return the bytes of `tensors` on this rank, and of the whole tensors."""
    mine = sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)
    return mine, sum(shape_of(tensor).numel() * tensor.element_size() for tensor in tensors)


def sums(tensors: Sequence[Tensor]) -> list[float]:
    """Return one float64 sum per tensor over the elements on this rank."""
    found: list[Any] = [local(tensor).detach().double().sum() for tensor in tensors]
    return torch.stack(found).tolist() if found else []
