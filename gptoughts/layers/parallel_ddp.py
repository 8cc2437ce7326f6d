"""One copy of the model per rank, gradients averaged while the backward still runs: throughput grows with GPUs, memory stays.

It hurts where the model with its optimizer state hardly fits one GPU, and over slow links. Ranks come from torchrun.
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
    """More than one rank, and a global batch that they can share evenly."""
    ranks = case.world.world_size
    if ranks == 1:
        yield unsupported("there is one process", remedy="torchrun --standalone --nproc-per-node N -m gptoughts -- train ...")
    elif case.recipe.train.global_batch % ranks:
        below = case.recipe.train.global_batch // ranks * ranks
        near = f"{below} or {below + ranks}" if below else f"{ranks}"
        yield unsupported(
            f"train.global_batch = {case.recipe.train.global_batch} cannot be shared by {ranks} ranks",
            remedy=f"--train.global-batch {near}",
        )


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """Gradients lie in the buckets that ranks exchange, which stay."""
    return replace(budget, accumulates=True)


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Wrap the real model. Buckets are views into the gradients, so that clipping and the optimizer need no copy."""
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
    yield
    undo()
    engine.model = before


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Ranks that started equal and stepped with equal gradients hold equal weights: their checksums are compared."""
    import torch
    import torch.distributed as dist

    if engine.ranks.size < 2 or not dist.is_initialized():
        return inactive("one process: no gradient was exchanged")
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
