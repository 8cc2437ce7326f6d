"""AdamW's moments in host memory, with the update on the host: saves 8 bytes of GPU memory per trained weight.

Gradients are copied to the host and weights back, 8 bytes per weight and update over PCIe, and the CPU computes the update; both happen
once per update, so a large global batch hides them. Needs 16 bytes of host memory per trained weight: moments, and pinned copies of
weight and gradient. It hurts where the state fits on the GPU, and where few cores serve a large GPU. Results equal the same AdamW on a
CPU. Its cost in time was not measured. Source: Ren et al. 2021, ZeRO-Offload.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from gptoughts.console import bytes_in_words
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
    slower,
    unsupported,
)
from gptoughts.planning.memory_fit import SOURCE, current_budget, memory_headroom

HOST_SHARE = 0.8  # of the machine's memory; the rest is for the system, data and Python


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """AdamW, enough host memory, and state that does not fit the GPU."""
    name = case.recipe.optim.name
    if name != "adamw":
        yield unsupported(f"the host update needs AdamW, optim.name is {name}", "--layer.optimizer-offload with-weights")
        return
    if not case.on_gpu:
        yield slower("the state is in host memory already", "no GPU")
        return
    budget, host, processes = current_budget(case), case.machine.memory_bytes, max(1, case.world.local_world_size)
    # Moments, and a copy of each gradient and of its weight.
    need = None if budget is None else (budget.optimizer + 2 * budget.gradients) * processes
    if need is not None and host is not None and need > HOST_SHARE * host:
        whose = "one process needs" if processes == 1 else f"{processes} processes need"
        yield unsupported(
            f"{whose} {bytes_in_words(need)} of host memory, more than {HOST_SHARE:.0%} of {bytes_in_words(host)}"
        )
        return
    everything = memory_headroom(case)
    if everything is None:
        yield slower("model size unknown before the data is read", "size of the optimizer state unknown")
    elif everything.is_enough:
        yield slower(f"weights, gradients, state and activations take {everything}", SOURCE)


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """On a GPU the state is in host memory."""
    return replace(budget, optimizer=0) if case.on_gpu else budget


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Wrap the optimizer slot's AdamW."""
    from gptoughts.layers.support.cpu_optimizer import OnHost

    before = engine.optimizer
    engine.optimizer = OnHost(before, engine.counters.call_counts)
    try:
        yield
    finally:
        engine.optimizer = before


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require a host update for every parameter with state, moments in host memory, changed weights, and on a GPU copies both ways."""
    given = [parameter for group in engine.optimizer.param_groups for parameter in group["params"]] if engine.optimizer else []
    held = [engine.optimizer.state[parameter] for parameter in given if engine.optimizer.state.get(parameter)]
    moments = [state[key] for state in held for key in ("exp_avg", "exp_avg_sq") if key in state]
    there = sum(moment.device.type == "cpu" for moment in moments)
    done = trace.call_counts.get(LAYER.name, 0)
    figures = {"updates": done, "parameters": len(given), "moments": there}
    if not done or done != len(held) or there < 2 * len(held):
        return inactive(
            f"{done} of {len(given)} parameters updated on the host, {there} of {len(moments)} moments in host memory",
            **figures,
        )
    if engine.device.type == "cuda" and trace.kernels and min(trace.copies.get(way, 0) for way in ("DtoH", "HtoD")) < done:
        return inactive(f"{done} updates on the host, fewer copies between host and GPU", **figures)
    if not trace.weights_moved:
        return inactive(f"{done} updates on the host, no weight changed", **figures)
    return active(f"{done} of {len(given)} parameters updated on the host, {there} moments in host memory", **figures)


LAYER = Layer(
    name="state-on-cpu",
    slot="optimizer_offload",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    needs_slots={"optimizer": ("plain", "fused")},
    changes_numerics=True,
    memory_rank=70,
)
