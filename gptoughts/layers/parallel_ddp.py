"""One copy of the model per rank, gradients averaged during the backward: throughput grows with GPUs, memory per GPU does not shrink.

It hurts where model and optimizer state barely fit one GPU, and over slow links. Start ranks with torchrun.
Source: Li et al. 2020, PyTorch Distributed; `torch.nn.parallel.DistributedDataParallel`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from gptoughts.planning.layer import (
    Budget,
    Case,
    Engine,
    Evidence,
    Layer,
    Options,
    Reason,
    StepTrace,
    active,
    inactive,
    unsupported,
)


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """More than one rank, and a global batch that divides evenly among them."""
    ranks = case.world.world_size
    if ranks == 1:
        yield unsupported("needs more than one process", remedy="gptoughts train ... --ranks N")
    elif case.recipe.train.global_batch % ranks:
        below = case.recipe.train.global_batch // ranks * ranks
        near = f"{below} or {below + ranks}" if below else f"{ranks}"
        yield unsupported(
            f"train.global_batch = {case.recipe.train.global_batch} is not divisible by {ranks} ranks",
            remedy=f"--train.global-batch {near}, or {_fewer(case)}",
        )


def _fewer(case: Case) -> str:
    """Return the flag for the most ranks that divide the global batch."""
    batch = case.recipe.train.global_batch
    most = next(ranks for ranks in range(case.world.world_size, 0, -1) if batch % ranks == 0)
    return f"--gpus {most}" if case.on_gpu and most <= case.world.local_world_size else f"--ranks {most}"


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """Gradients stay allocated: they are views of the buckets that ranks exchange."""
    return replace(budget, accumulates=True)


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Wrap the model in DistributedDataParallel. Gradients are views of the buckets, so clipping and the optimizer need no copy."""
    from torch.nn.parallel import DistributedDataParallel

    before = engine.model
    on_gpu = engine.device.type == "cuda"
    wrapped = DistributedDataParallel(
        before, device_ids=[engine.device.index] if on_gpu else None, gradient_as_bucket_view=True
    )
    engine.model = wrapped

    def only_in_last(last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else wrapped.no_sync()

    undo = engine.wrap_context("grad_sync", only_in_last)
    try:
        yield
    finally:
        undo()
        engine.model = before


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require equal weight checksums on all ranks: ranks that start equal and apply equal gradients stay equal."""
    import torch
    import torch.distributed as dist

    if engine.ranks.size < 2 or not dist.is_initialized():
        return inactive("one process: no gradient exchange")
    mine = torch.stack([parameter.detach().double().sum() for parameter in engine.parameters()]).sum()
    least, most = mine.clone(), mine.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    exchanges = trace.calls("allreduce", "all_reduce")
    if least.item() != most.item():
        return inactive(f"weights differ between ranks by {most.item() - least.item():.3e} after the step")
    return active(f"{engine.ranks.size} ranks hold equal weights, {exchanges} exchanges in the step", exchanges=exchanges)


LAYER = Layer(
    name="ddp",
    slot="parallel",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    wraps=("grad_sync",),
    changes_numerics=True,
)
