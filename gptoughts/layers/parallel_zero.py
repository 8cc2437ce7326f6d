"""ZeRO by DeepSpeed: optimizer state (stage 1), gradients (2) and weights (3) sharded over ranks.

Each stage needs less memory than the one before; 3 also exchanges every weight twice per step. Take `fsdp2` where there is no reason for
DeepSpeed: it gathers in bfloat16 without rounding gradients, and composes with more layers. ZeRO is there for teams that use it, and to
compare. It hurts where a replica fits, and the host waits for the gradient norm in every step. DeepSpeed keeps one more float32 copy of
the weights that a rank updates. Under bfloat16 autocast stage 3 gathers weights and reduces gradients of linear layers in bfloat16, as
DeepSpeed does; all else is exchanged in float32. `offload` keeps partitions in host memory, and updates there.
Source: Rajbhandari et al. 2020, ZeRO; `deepspeed.initialize`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from gptoughts.console import bytes_in_words
from gptoughts.layers.support.several_ranks import gathered_bytes, outside_host_memory, rank_reasons
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
from gptoughts.planning.memory_model import baseline

ELEMENTWISE = ("adamw", "lion")
"""Optimizers whose update of a weight needs no other weight, and no count of updates in their groups."""
MIB = 2**20


def _offloads(options: Options) -> bool:
    return bool(options["offload"] or options.get("offload_weights"))


def _unmet(stage: int) -> Callable[[Case, Options], Iterator[Reason]]:
    def unmet(case: Case, options: Options) -> Iterator[Reason]:
        """Ranks that divide the batch, an elementwise optimizer, float32 weights, blocks that run eagerly under stage 3."""
        yield from rank_reasons(case, least=1 if _offloads(options) else 2)
        if case.recipe.optim.name not in ELEMENTWISE:
            yield unsupported(
                f"optim.name = {case.recipe.optim.name} does not update flattened parameter groups", remedy="--optim.name adamw"
            )
        if case.recipe.train.bad_step != "stop":
            yield unsupported(
                f"train.bad_step = {case.recipe.train.bad_step}: DeepSpeed clips and updates in one call, and starts once per process",
                remedy="--train.bad-step stop",
            )
        if case.recipe.adapter.base == "nf4":
            yield unsupported("DeepSpeed takes float32 weights only, not nf4 codes", remedy="--adapter.base full")
        if stage == 3 and case.compiles:
            yield unsupported("DeepSpeed's hooks, which gather weights, cannot be compiled", remedy="--layer.compile eager")
        if stage == 3 and case.spec.family is None:
            yield unsupported("the repeated blocks of this model are not known")

    return unmet


def _memory(stage: int) -> Callable[[Case, Options, Budget], Budget]:
    def memory(case: Case, options: Options, budget: Budget) -> Budget:
        """Shards by stage, the float32 copy of a rank's partition, and the buckets of gradients that are exchanged."""
        ranks = case.world.world_size

        def share(size: int) -> int:
            return -(-size // ranks)

        offloads = case.on_gpu and _offloads(options)
        buckets = (2 if case.on_gpu else 1) * min(options["bucket_mb"] * MIB, budget.gradients)
        weights, cast = _float32_weights(case, budget), budget.cast_weights
        copy = 0 if offloads else share(budget.gradients)  # of trained weights
        if stage == 3:
            weights = 0 if offloads and options["offload_weights"] else share(weights)
            cast = gathered_bytes(case, budget, 4) + budget.workspace
        return replace(
            budget,
            weights=weights + copy,
            gradients=(budget.gradients if stage == 1 else 0 if offloads else share(budget.gradients)) + buckets,
            optimizer=0 if offloads else share(budget.optimizer),
            cast_weights=cast,
            recasts=budget.recasts and stage < 3,
            temporary=share(budget.temporary),
            accumulates=True,
        )

    return memory


def _float32_weights(case: Case, budget: Budget) -> int:
    """Return the bytes of all weights in float32, also of those that other strategies keep in 16 bits."""
    if case.spec.stored_bytes is None or case.recipe.adapter.kind == "none":
        return budget.weights
    whole = baseline(replace(case.spec, stored_bytes=None), case.recipe, 1)
    return budget.weights if whole is None else whole.weights


def _apply(stage: int) -> Callable[[Engine, Options], AbstractContextManager[None]]:
    def apply(engine: Engine, options: Options) -> AbstractContextManager[None]:
        """Partition the model for stage 3; start DeepSpeed's engine when the optimizer is attached."""
        from gptoughts.layers.support.zero import Request, zero_engine

        weights = bool(options.get("offload_weights"))
        return zero_engine(engine, Request(stage, options["bucket_mb"] * MIB, _offloads(options), weights))

    return apply


def _verify(stage: int) -> Callable[[Engine, StepTrace, Options], Evidence]:
    def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
        """Require DeepSpeed's update, partitions and moments of 1/N, and weights that are equal (1, 2) or partitioned (3)."""
        from gptoughts.engine.distributed.shards import local
        from gptoughts.layers.support.zero_optimizer import ZeroOptimizer

        optimizer, ranks = engine.optimizer, engine.ranks.size
        if not isinstance(optimizer, ZeroOptimizer) or not trace.call_counts.get("zero"):
            return inactive("the optimizer updates whole weights on every rank: DeepSpeed is not in the step")
        given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not given == set(map(id, optimizer.places)) == set(map(id, engine.parameters())):
            return inactive("DeepSpeed updates other tensors than the weights that compute")
        if not engine.ranks.any(trace.weights_moved):
            return inactive("no weight changed in the step")
        mine, moments = optimizer.partition_bytes()
        figures, problem = _weights(engine, stage)
        total = figures["trained_bytes"]
        slack = 16 * ranks * len(optimizer.places)  # padding to equal ranges
        if not problem and _offloads(options):
            problem = outside_host_memory(place.flat for place in optimizer.places.values())
        if not problem and options.get("offload_weights"):
            problem = outside_host_memory(local(parameter) for parameter in engine.bare.parameters())
        if problem:
            return inactive(problem, **figures)
        if mine > total / ranks + slack:
            return inactive(f"this rank updates {bytes_in_words(mine)} of {bytes_in_words(total)}, more than 1/{ranks}")
        exchanges = trace.calls("allreduce", "all_reduce", "reduce_scatter", "gloo:reduce", "nccl:reduce")
        gathers = trace.calls("allgather", "all_gather", "broadcast")
        if ranks > 1 and not (exchanges and gathers):
            return inactive(f"{exchanges} reductions and {gathers} gathers in the step")
        what = f"ZeRO-{stage}: this rank updates {bytes_in_words(mine)} of {bytes_in_words(total)} weights (1/{ranks})"
        held = f", holds {bytes_in_words(figures['held_bytes'])} between steps" if stage == 3 else ""
        return active(
            f"{what}{held}, {exchanges} reductions, {gathers} gathers",
            updated_bytes=mine, state_bytes=moments, exchanges=exchanges, gathers=gathers, **figures,
        )  # fmt: skip

    return verify


def _weights(engine: Engine, stage: int) -> tuple[dict[str, int], str]:
    """Return the bytes of weights on this rank and in all, and what is wrong with them; an empty text if nothing is."""
    from gptoughts.engine.distributed.replicas import demand_equal_weights
    from gptoughts.engine.distributed.shards import held_bytes, local
    from gptoughts.errors import RunError

    parameters = list(engine.bare.parameters())
    held, _ = held_bytes(parameters)
    figures = {"held_bytes": held, "trained_bytes": held_bytes(engine.parameters())[1]}
    left_out = sum(local(parameter) is parameter for parameter in parameters)
    if stage == 3:
        return figures, f"{left_out} of {len(parameters)} parameters are whole on this rank" if left_out else ""
    try:
        demand_equal_weights(engine)
    except RunError as error:
        return figures, str(error).splitlines()[0]
    return figures, "" if left_out == len(parameters) else "weights are partitioned, which is stage 3"


OPTIONS = {
    "offload": Option(False, "keep what a rank updates, weights and moments, in host memory", kind=bool),
    "bucket_mb": Option(25, "MiB of gradients that are exchanged together", kind=int),
}
WEIGHTS = Option(False, "keep this rank's share of the weights that compute there too", kind=bool)
COMMON_CLASHES: Mapping[str, str] = {
    "fp16": "DeepSpeed clips and updates in one call, between which its scaler would act",
    "8bit": "8-bit state has one scale per 256 values of a tensor, and DeepSpeed updates flattened groups",
    "state-on-cpu": "DeepSpeed holds the state; --layer.parallel.offload true keeps it on the CPU",
    "in-backward": "DeepSpeed updates after the backward, in its own step",
    "compile-model": "DeepSpeed's hooks on the model's forward cannot be compiled",
    "cuda-graph": "DeepSpeed's hooks on gradients cannot be captured",
    "auto": "its trials restore weights and optimizer, which DeepSpeed holds flattened",
    "fp8-te": "Transformer Engine keeps FP8 copies of weights that DeepSpeed replaces",
}
PARTITIONED_CLASHES: Mapping[str, str] = {
    "offload-activations": "it would copy gathered weights to the CPU with the activations",
    "fp8-torchao": "its linear layers keep gathered weights for the backward",
}


def _layer(stage: int, what: str, **more: Any) -> Layer:
    return Layer(
        name=f"zero{stage}",
        slot="parallel",
        card=f"{what}\n\n{(__doc__ or '').partition(chr(10) * 2)[2]}",
        apply=_apply(stage),
        verify=_verify(stage),
        memory=_memory(stage),
        unmet=_unmet(stage),
        phase=Phase.SHAPE,
        packages=(("deepspeed", "deepspeed"),),
        wraps=("attach", "grad_sync"),
        replaces=("backward", "clip", "step"),
        changes_numerics=True,
        former_names=(f"deepspeed-{stage}", f"zero-{stage}", *(("deepspeed",) if stage == 2 else ())),
        **more,
    )


ZERO1 = _layer(1, "ZeRO-1 by DeepSpeed: each rank holds 1/N of the optimizer state.", options=OPTIONS, clashes=COMMON_CLASHES)
ZERO2 = _layer(2, "ZeRO-2 by DeepSpeed: 1/N of optimizer state and gradients.", options=OPTIONS, clashes=COMMON_CLASHES)
ZERO3 = _layer(
    3,
    "ZeRO-3 by DeepSpeed: 1/N of weights, gradients and optimizer state.",
    options={**OPTIONS, "offload_weights": WEIGHTS},
    clashes={**COMMON_CLASHES, **PARTITIONED_CLASHES},
    permanent="weights stay partitioned",
)
