"""AdamW's moments live in host memory and the update runs on the host: the GPU is relieved of 8 bytes a trained weight.

Gradients travel down and weights up, 8 bytes a weight and update over PCIe, and the host's cores compute the update; both are paid once an
update, so a large global batch hides them. Takes 16 bytes a trained weight of host memory: moments, and pinned copies of weight and
gradient that the update works on. It hurts wherever the state would have fitted, and where few cores stand beside a large GPU. Results
are those of the same AdamW on a CPU. What it costs in time was not measured. Source of the idea: Ren et al. 2021, ZeRO-Offload.
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
from gptoughts.planning.memory_fit import SOURCE, counted, room

HOST_SHARE = 0.8  # of the machine's memory; the system, the data and Python's own take some too


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """AdamW in float32, memory on the host, and state that would not fit the device."""
    name = case.recipe.optim.name
    if name != "adamw":
        yield unsupported(
            f"updates on the host with torch's AdamW, and optim.name is {name}", "--layer.optimizer-offload with-weights"
        )
        return
    if not case.on_gpu:
        yield slower("the state lies in host memory already", "no device to relieve")
        return
    budget, host, processes = counted(case), case.machine.memory_bytes, max(1, case.world.local_world_size)
    # The moments, and one copy of each gradient and of each weight that has one.
    need = None if budget is None else (budget.optimizer + 2 * budget.gradients) * processes
    if need is not None and host is not None and need > HOST_SHARE * host:
        whose = "one process needs" if processes == 1 else f"{processes} processes need"
        yield unsupported(
            f"{whose} {bytes_in_words(need)} of host memory, more than {HOST_SHARE:.0%} of the {bytes_in_words(host)} here"
        )
        return
    everything = room(case)
    if everything is None:
        yield slower("not all sizes of the model are known before its data is read", "optimizer state cannot be weighed")
    elif everything.is_enough:
        yield slower(f"weights, gradients, state and activations take {everything}", SOURCE)


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """On a GPU the state lies with the host."""
    return replace(budget, optimizer=0) if case.on_gpu else budget


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Stand between the engine and the AdamW that the optimizer slot made."""
    from gptoughts.layers.support.cpu_optimizer import OnHost

    before = engine.optimizer
    engine.optimizer = OnHost(before, engine.counters.call_counts)
    yield
    engine.optimizer = before


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Every parameter with a memory was updated on the host, the moments lie there, and weights moved; on a GPU copies went both ways."""
    given = [parameter for group in engine.optimizer.param_groups for parameter in group["params"]] if engine.optimizer else []
    held = [engine.optimizer.state[parameter] for parameter in given if engine.optimizer.state.get(parameter)]
    moments = [state[key] for state in held for key in ("exp_avg", "exp_avg_sq") if key in state]
    there = sum(phase.device.type == "cpu" for phase in moments)
    done = trace.call_counts.get("state-on-cpu", 0)
    figures = {"updates": done, "parameters": len(given), "moments": there}
    if not done or done != len(held) or there < 2 * len(held):
        return inactive(
            f"{done} of {len(given)} parameters updated on the host, {there} of {len(moments)} moments there", **figures
        )
    if engine.device.type == "cuda" and trace.kernels and min(trace.copies.get(way, 0) for way in ("DtoH", "HtoD")) < done:
        return inactive(f"{done} updates on the host, and fewer copies between it and the GPU", **figures)
    if not trace.weights_moved:
        return inactive(f"{done} updates on the host, and no weight moved", **figures)
    return active(f"{done} of {len(given)} parameters updated on the host, {there} moments there", **figures)


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
)
