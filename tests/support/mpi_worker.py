"""One rank of the MPI tests, under mpirun: compares collectives with gloo's, trains over both, and writes what came of it."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from gptoughts.engine.distributed.process_group import process_group
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.errors import RunError
from gptoughts.hardware.world import World, world_from_environment
from tests.support import ddp_worker

Group = dist.ProcessGroup | None
SHAPES = [(1,), (7,), (3, 5), (2, 3, 4), (70_001,), (0,)]
SUMMED = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCED = [*SUMMED, torch.int32, torch.int64, torch.uint8, torch.int8]
MOVED = [*REDUCED, torch.bool]
CASES = 120
PRECISIONS = (torch.float32, torch.bfloat16)


def reduced(operation: Any) -> Callable[..., list[Tensor]]:
    def run(value: Tensor, group: Group, root: int) -> list[Tensor]:
        dist.all_reduce(value, operation, group)
        return [value]

    return run


def averaged(value: Tensor, group: Group, root: int) -> list[Tensor]:
    """gloo has no average."""
    dist.all_reduce(value, dist.ReduceOp.SUM if group else dist.ReduceOp.AVG, group)
    return [value / dist.get_world_size() if group else value]


def multiplied(value: Tensor, group: Group, root: int) -> list[Tensor]:
    """gloo has no sum of products; a factor of one half rounds nothing."""
    if group:
        dist.all_reduce(value.mul_(0.5), group=group)
    else:
        dist.all_reduce(value, dist.ReduceOp.PREMUL_SUM(0.5))
    return [value]


def strided(value: Tensor, group: Group, root: int) -> list[Tensor]:
    """Reduce every second column; gloo takes contiguous memory only."""
    wide = torch.stack([value, value], -1)[..., 0]
    given = wide.contiguous() if group else wide
    dist.all_reduce(given, group=group)
    return [given.contiguous()]


def reduced_to_root(value: Tensor, group: Group, root: int) -> list[Tensor]:
    dist.reduce(value, root, group=group)
    return [value] if dist.get_rank() == root else []


def sent_around(value: Tensor, group: Group, root: int) -> list[Tensor]:
    dist.broadcast(value, root, group)
    return [value]


def gathered_in_one(value: Tensor, group: Group, root: int) -> list[Tensor]:
    whole = value.new_empty(dist.get_world_size() * value.shape[0], *value.shape[1:])
    dist.all_gather_into_tensor(whole, value, group)
    return [whole]


def gathered_from_its_own_part(value: Tensor, group: Group, root: int) -> list[Tensor]:
    """As FSDP2 does: the input is this rank's part of the output."""
    rows = value.shape[0]
    whole = value.new_zeros(dist.get_world_size() * rows, *value.shape[1:])
    own = whole.narrow(0, dist.get_rank() * rows, rows).copy_(value)
    dist.all_gather_into_tensor(whole, own.clone() if group else own, group)
    return [whole]


def gathered(value: Tensor, group: Group, root: int) -> list[Tensor]:
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value, group)
    return parts


def gathered_on_root(value: Tensor, group: Group, root: int) -> list[Tensor]:
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())] if dist.get_rank() == root else None
    dist.gather(value, parts, root, group)
    return parts or []


def scattered(value: Tensor, group: Group, root: int) -> list[Tensor]:
    parts = [value + rank for rank in range(dist.get_world_size())] if dist.get_rank() == root else None
    mine = torch.empty_like(value)
    if parts is not None:
        parts = [part.to(value.dtype) for part in parts]
    dist.scatter(mine, parts, root, group)
    return [mine]


def reduced_and_scattered(value: Tensor, group: Group, root: int) -> list[Tensor]:
    size, mine = dist.get_world_size(), torch.empty_like(value)
    dist.reduce_scatter_tensor(mine, torch.cat([(value + rank).to(value.dtype) for rank in range(size)]), group=group)
    return [mine]


def all_to_all(value: Tensor, group: Group, root: int) -> list[Tensor]:
    size, rank = dist.get_world_size(), dist.get_rank()
    mine = torch.empty_like(torch.cat([value] * size))
    dist.all_to_all_single(mine, torch.cat([value] * size), group=group)
    counts = [[1 + (one + other) % 2 for other in range(size)] for one in range(size)]
    rows = torch.arange(float(sum(counts[rank]))) + 100 * rank
    uneven = torch.empty(sum(counts[one][rank] for one in range(size)))
    dist.all_to_all_single(uneven, rows, [counts[one][rank] for one in range(size)], counts[rank], group=group)
    return [mine, uneven]


OPERATIONS: dict[str, tuple[Callable[..., list[Tensor]], list[torch.dtype]]] = {
    "sum": (reduced(dist.ReduceOp.SUM), REDUCED),
    "max": (reduced(dist.ReduceOp.MAX), REDUCED),
    "min": (reduced(dist.ReduceOp.MIN), REDUCED),
    "average": (averaged, SUMMED),
    "premultiplied": (multiplied, SUMMED),
    "strided": (strided, REDUCED),
    "reduce": (reduced_to_root, REDUCED),
    "reduce_scatter": (reduced_and_scattered, SUMMED),
    "broadcast": (sent_around, MOVED),
    "all_gather": (gathered, MOVED),
    "all_gather_single": (gathered_in_one, MOVED),
    "all_gather_in_place": (gathered_from_its_own_part, MOVED),
    "gather": (gathered_on_root, MOVED),
    "scatter": (scattered, MOVED),
    "all_to_all": (all_to_all, MOVED),
}


def collectives(gloo: dist.ProcessGroup) -> dict[str, float]:
    """Draw shapes, types and operations. Returns each case's largest difference from gloo's result."""
    draw, found = random.Random(7), {}  # the same draws on every rank
    names = list(OPERATIONS)
    for number in range(CASES):
        name, shape = names[number % len(names)], draw.choice(SHAPES)
        operation, dtypes = OPERATIONS[name]
        dtype, root = draw.choice(dtypes), draw.randrange(dist.get_world_size())
        torch.manual_seed(1000 * number + dist.get_rank())
        value = (torch.randn(shape).abs() * 20).to(dtype)
        ours, theirs = (operation(value.clone(), group, root) for group in (None, gloo))
        found[f"{number} {name} {dtype} {shape}"] = max(map(difference, ours, theirs), default=0.0)
        assert len(ours) == len(theirs)
    return found


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest absolute difference; types and shapes must be equal."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).abs().max()) if ours.numel() else 0.0


def asynchronous() -> bool:
    """Start several reductions before any is waited for, and one in a group of one rank."""
    values = [torch.full((1000,), float(number + dist.get_rank())) for number in range(8)]
    works = [dist.all_reduce(value, async_op=True) for value in values]
    for work in works:
        work.wait()
    size = dist.get_world_size()
    offset = size * (size - 1) / 2
    alone = [dist.new_group([rank]) for rank in range(size)][dist.get_rank()]
    single = torch.tensor(3.0)
    dist.all_reduce(single, group=alone)
    dist.barrier()
    objects: list[Any] = [None] * size
    dist.all_gather_object(objects, {"rank": dist.get_rank()})
    return (
        all(bool((value == number * size + offset).all()) for number, value in enumerate(values))
        and all(work.is_completed() for work in works)
        and single.item() == 3.0
        and objects == [{"rank": rank} for rank in range(size)]
    )


def refused() -> str:
    """An average of integers does not exist; every rank raises before it communicates."""
    with suppress(RunError):
        dist.all_reduce(torch.ones(2, dtype=torch.int64), dist.ReduceOp.AVG)
        return "accepted"
    return "refused"


def sharded(group: dist.ProcessGroup, dtype: torch.dtype) -> list[float]:
    """Train a small model under FSDP2 over the group. Returns the losses, averaged over ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(13, 29), nn.GELU(), nn.Linear(29, 13)) for _ in range(3)))
    mesh = DeviceMesh.from_group(group, "cpu")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in (*model, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
        if group is not dist.group.WORLD:
            part.set_force_sum_reduction_for_comms(True)  # gloo has no average
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    for step in range(4):
        torch.manual_seed(100 * step + dist.get_rank())
        rows = torch.randn(8, 13)
        loss = (model(rows).float() - rows.flip(0)).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses += [float(total) / dist.get_world_size(), float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)]
    return losses


def main(out: str) -> None:
    """Everything that one launch can show, so that ranks start once. Rank 0 writes `out`.json and what `ddp_worker` writes."""
    world, cpu = world_from_environment(os.environ), torch.device("cpu")
    with process_group(world, cpu, "mpi") as ranks:
        ddp_worker.train("modern", f"{out}-mpi", world, ranks)
        gloo = dist.new_group(backend="gloo")
        assert gloo is not None and dist.group.WORLD is not None
        record: dict[str, Any] = {"backends": [dist.get_backend(), dist.get_backend(gloo)], "refused": refused()}
        record["asynchronous"] = asynchronous()
        record["worst"] = {name: ranks.largest(value) for name, value in collectives(gloo).items()}
        record["sharded"] = {str(dtype): [sharded(dist.group.WORLD, dtype), sharded(gloo, dtype)] for dtype in PRECISIONS}
    with process_group(world, cpu, "mpi") as ranks:  # MPI starts once in a process; groups can be opened again
        record["again"] = float(ranks.sum(1.0))
    dist.init_process_group("gloo", store=dist.FileStore(f"{out}-store"), rank=world.rank, world_size=world.world_size)
    ddp_worker.train("modern", f"{out}-gloo", world, Ranks(world, cpu))
    dist.destroy_process_group()
    if world.rank == 0:
        ddp_worker.train("modern", f"{out}-single", World(), Ranks(World(), cpu))
        with open(f"{out}.json", "w", encoding="utf-8") as file:
            json.dump(record, file)


def fail(out: str) -> None:
    """Rank 1 raises where the others wait for it."""
    world = world_from_environment(os.environ)
    with process_group(world, torch.device("cpu"), "mpi") as ranks:
        ranks.barrier()
        if world.rank == 1:
            raise RunError("rank 1: cannot continue", found="a test")
        ranks.barrier()
    raise AssertionError("the other ranks waited for a rank that is gone")


def contradict(out: str) -> None:
    """Open the group as rank 0 of 2, in a world of one."""
    with process_group(World(0, 0, 2, 2, "torchrun"), torch.device("cpu"), "mpi"):
        raise AssertionError("the worlds differ")


if __name__ == "__main__":
    {"all": main, "fail": fail, "contradict": contradict}[sys.argv[1]](sys.argv[2])
