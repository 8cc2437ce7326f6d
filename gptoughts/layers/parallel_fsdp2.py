"""Weights, gradients and optimizer state sharded over ranks: each rank holds 1/N, and gathers the weights of a block when it computes it.

Memory per GPU shrinks with the number of ranks. It hurts where a replica fits: ranks exchange every weight twice per step (forward and
backward), where `ddp` exchanges gradients once. Blocks are gathered in bfloat16 where the precision layer computes in it. `replicas` > 1
shards inside groups of ranks and replicates over groups (hybrid sharding), so that weights are only gathered inside a node. `offload`
keeps shards and the optimizer on the CPU. Gradients are reduced in float32, in every micro-batch.
Source: Zhao et al. 2023, PyTorch FSDP; `torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gptoughts.console import bytes_in_words
from gptoughts.layers.support.several_ranks import autocasts_to_bf16, gathered_bytes, outside_host_memory, rank_reasons
from gptoughts.planning.layer import (
    Budget,
    Case,
    Engine,
    Evidence,
    Layer,
    Option,
    Options,
    Phase,
    Reason,
    StepTrace,
    active,
    inactive,
    unsupported,
)

if TYPE_CHECKING:
    import torch

NAME = "fsdp2"
GATHERS, REDUCES = ("allgather", "all_gather"), ("reduce_scatter",)
ELEMENTWISE = ("adamw", "lion", "ademamix", "schedule-free")
"""Optimizers whose update of a weight needs no other weight, so that a shard is updated like the whole."""


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """Ranks that divide the batch and the replicas, an elementwise optimizer, weights that can be sharded by rows."""
    ranks, replicas, recipe = case.world.world_size, options["replicas"], case.recipe
    yield from rank_reasons(case, least=1 if options["offload"] else 2)
    if case.spec.family is None:
        yield unsupported("the repeated blocks of this model are not known")
    if options["offload"] and case.on_gpu and ranks > 1:
        yield unsupported("offload with several GPUs needs collectives on CPU tensors, which their process group does not have")
    if ranks % replicas:
        yield unsupported(f"replicas = {replicas} does not divide {ranks} ranks")
    if recipe.optim.name not in ELEMENTWISE:
        yield unsupported(f"optim.name = {recipe.optim.name} needs whole matrices", remedy="--optim.name adamw")
    if recipe.adapter.base == "nf4":
        yield unsupported("the nf4 codes of a frozen base are not rows that can be sharded", remedy="--adapter.base full")


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """A shard of weights, gradients and state; in addition the gathered embedding and head, and the blocks in use."""
    ranks, shards = case.world.world_size, case.world.world_size // options["replicas"]
    if ranks % options["replicas"]:
        return budget
    half = options["gather"] == "auto" and budget.cast_weights > 0
    gathered = gathered_bytes(case, budget, 2 if half else 4)
    on_device = 0 if options["offload"] and case.on_gpu else 1
    return replace(
        budget,
        weights=on_device * -(-budget.weights // shards),
        gradients=on_device * -(-budget.gradients // shards),
        optimizer=on_device * -(-budget.optimizer // shards),
        cast_weights=gathered if half else gathered + budget.workspace,
        recasts=False,
        temporary=budget.temporary // shards,
        accumulates=True,
    )


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Shard every block, then the rest, while the model is on meta: no rank ever holds all weights."""
    import torch
    from torch.distributed.fsdp import FSDPModule, fully_shard

    with ExitStack() as stack:
        mesh = _mesh(engine, options["replicas"], stack)
        half = _gather_dtype(engine) if options["gather"] == "auto" else None
        common: dict[str, Any] = {"mesh": mesh}
        if options["offload"]:
            from torch.distributed.fsdp import CPUOffloadPolicy

            common["offload_policy"] = CPUOffloadPolicy(pin_memory=engine.device.type == "cuda")
            engine.storage = torch.device("cpu")
        for block in engine.blocks.values():
            fully_shard(block, mp_policy=_policy(half), reshard_after_forward=options["reshard"], **common)
        # Embedding, head and last norm stay in float32: their outputs are the residual stream and the logits.
        fully_shard(engine.bare, mp_policy=_policy(None), **common)
        kept = [module for module in engine.bare.modules() if isinstance(module, FSDPModule)]
        try:
            yield
        finally:
            engine.storage = None
            for module in kept:
                module.reshard()


def _policy(dtype: torch.dtype | None) -> Any:
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _gather_dtype(engine: Engine) -> torch.dtype | None:
    """Return bfloat16 if forwards run under bfloat16 autocast; then a gathered cast weight equals the one that autocast makes."""
    import torch

    return torch.bfloat16 if autocasts_to_bf16(engine) else None


def _mesh(engine: Engine, replicas: int, stack: ExitStack) -> Any:
    """Return the device mesh: all ranks, or replicas x shards. A single process opens a group of its own."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from gptoughts.engine.distributed.process_group import own_group

    stack.enter_context(own_group(engine.device))
    ranks = dist.get_world_size()
    if replicas == 1:
        return init_device_mesh(engine.device.type, (ranks,))
    return init_device_mesh(engine.device.type, (replicas, ranks // replicas), mesh_dim_names=("replicate", "shard"))


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require every parameter and its state to be 1/N of the whole, the optimizer to hold these shards, and both exchanges."""
    from gptoughts.engine.distributed.shards import held_bytes, is_sharded, local

    ranks = engine.ranks.size // options["replicas"]
    parameters = list(engine.bare.parameters())
    trained = engine.parameters()
    left_out = [parameter for parameter in parameters if local(parameter) is parameter]
    if not is_sharded(engine.bare) or left_out:
        return inactive(f"{len(left_out)} of {len(parameters)} parameters are whole on this rank")
    given = {id(one) for group in engine.optimizer.param_groups for one in group["params"]} if engine.optimizer else set()
    if given != {id(parameter) for parameter in trained}:
        return inactive("the optimizer holds other tensors than the shards: the weights that compute are not updated")
    if not engine.ranks.any(trace.weights_moved):
        return inactive("no shard changed in the step")
    mine, total = held_bytes(parameters)
    states = [value for state in engine.optimizer.state.values() for value in state.values() if _is_large(value)]
    state_mine, state_total = held_bytes(states)
    problem = outside_host_memory([*map(local, parameters), *map(local, states)]) if options["offload"] else ""
    if problem:
        return inactive(f"offload: {problem}")
    # Rows are not divided evenly: one more row of each tensor on the first ranks.
    slack = sum(parameter[:1].numel() * parameter.element_size() for parameter in parameters)
    if mine > total / ranks + slack or state_mine > state_total / ranks + 2 * slack:
        return inactive(f"this rank holds {bytes_in_words(mine)} of {bytes_in_words(total)}, more than 1/{ranks}")
    gathers, reduces = trace.calls(*GATHERS), trace.calls(*REDUCES)
    if engine.ranks.size > 1 and not (gathers and reduces):
        return inactive(f"{gathers} all-gathers and {reduces} reduce-scatters in the step")
    text = f"{bytes_in_words(mine)} of {bytes_in_words(total)} weights on this rank (1/{ranks})"
    return active(
        f"{text}, {gathers} all-gathers, {reduces} reduce-scatters",
        held_bytes=mine,
        total_bytes=total,
        state_bytes=state_mine,
        gathers=gathers,
        reduces=reduces,
    )


def _is_large(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.dim() > 0


LAYER = Layer(
    name=NAME,
    slot="parallel",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    phase=Phase.SHAPE,
    options={
        "gather": Option(
            "auto",
            "dtype in which blocks are gathered; auto is bfloat16 under bfloat16 autocast, else float32",
            choices=("auto", "float32"),
        ),
        "reshard": Option(True, "free gathered blocks after the forward; false keeps them until the backward", kind=bool),
        "replicas": Option(1, "groups of ranks that replicate each other; 1 shards over all ranks", kind=int),
        "offload": Option(False, "keep shards, gradients and optimizer state in host memory", kind=bool),
    },
    clashes={
        "fp16": "its scaler looks for infinite gradients on this rank, and shards differ between ranks",
        "offload-activations": "it would copy gathered weights to the CPU with the activations",
        "8bit": "8-bit state has one scale per 256 values of a whole tensor",
        "state-on-cpu": "it pins whole tensors; --layer.parallel.offload true keeps the shards on the CPU",
        "in-backward": "gradients are sharded after the backward of their block, where it updates whole weights",
        "compile-model": "hooks that gather weights run between blocks, inside the one graph",
        "cuda-graph": "hooks that gather weights run between blocks, and cannot be captured",
        "fp8-te": "Transformer Engine keeps FP8 copies of whole weights",
    },
    changes_numerics=True,
    permanent="modules stay sharded",
    memory_rank=35,
)
