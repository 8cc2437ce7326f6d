"""One copy of the model per rank, gradients averaged during the backward: throughput grows with GPUs, memory per GPU does not shrink.

It hurts where model and optimizer state barely fit one GPU, and over slow links; `compress=bf16` halves what ranks exchange and rounds
gradients. `static` lets DDP assume that every step uses the same parameters in the same order.
Source: Li et al. 2020, PyTorch Distributed; `torch.nn.parallel.DistributedDataParallel`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from gptoughts.layers.support.several_ranks import rank_reasons
from gptoughts.planning.layer import (
    Budget,
    Case,
    Engine,
    Evidence,
    Layer,
    Option,
    Options,
    Reason,
    StepTrace,
    active,
    inactive,
    slower,
)
from gptoughts.planning.memory_fit import SOURCE as MEMORY_SOURCE
from gptoughts.planning.memory_fit import memory_headroom


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """More than one rank, a global batch that divides among them, and memory for a replica."""
    yield from rank_reasons(case)
    room = memory_headroom(case, lambda budget: memory(case, options, budget)) if case.world.world_size > 1 else None
    if room is not None and not room.is_enough:
        yield slower(f"a replica does not fit: {room}", MEMORY_SOURCE)


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
        before,
        device_ids=[engine.device.index] if on_gpu else None,
        gradient_as_bucket_view=True,
        bucket_cap_mb=options["bucket_mb"],
        static_graph=options["static"],
    )
    if options["compress"] == "bf16":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        wrapped.register_comm_hook(None, bf16_compress_hook)
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
    options={
        "bucket_mb": Option(25, "MiB of gradients that are exchanged together", kind=int),
        "static": Option(False, "assume the same parameters in the same order in every step", kind=bool),
        "compress": Option("none", "dtype in which gradients are exchanged", choices=("none", "bf16")),
    },
    wraps=("grad_sync",),
    changes_numerics=True,
)
