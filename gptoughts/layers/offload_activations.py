"""What the forward saves for the backward waits in host memory: the device holds the activations of a few operators at a time.

A side stream copies each saved tensor into pinned memory while the forward goes on and fetches it before the backward asks. Weights stay, and
their casts; so do tensors below `least_bytes`. With recomputation only what enters a block is saved, and so only that travels; with compiled
blocks what the compiled graph saves. It hurts where the bus is slower than the forward is: every byte crosses it twice, and 1 GiB each way
takes at least 34 ms on PCIe 4.0 x16 (its 32 GB/s). It takes that much pinned memory of the host, and the first step is slow while that is
allocated. The gradient is bit for bit the same. Llama-3.2-3B on an A100 with recomputation: 23.1 to 21.8 GiB, 7,309 to 7,301
tok/s (torchtune's README). Source: Rhu et al. 2016, vDNN; `torch.autograd.graph.saved_tensors_hooks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

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
    unsupported,
)
from gptoughts.planning.memory_fit import SOURCE, room


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """Blocks to count by, a device to relieve, and activations that do not fit it."""
    if case.spec.family is None:
        yield unsupported("needs a model of a known family, whose blocks its proof counts")
        return
    if not case.on_gpu:
        yield slower("activations lie in host memory already", "no device to relieve")
        return
    everything = room(case)
    if everything is not None and everything.is_enough:
        yield slower(f"weights, optimizer and activations take {everything}", SOURCE)


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """On a GPU two blocks' activations stay, the others lie with the host."""
    return replace(budget, moved=max(0.0, 1 - 2 / budget.depth)) if case.on_gpu else budget


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Hooks on what autograd saves, around every training forward."""
    from gptoughts.layers.support.activation_offload import HostActivations

    offload = HostActivations(
        engine.bare, options["least_bytes"], options["ahead"], len(engine.blocks), engine.counters.call_counts
    )
    undo = engine.wrap_context("forward_context", offload.context)
    yield
    undo()


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """In every forward at least a tensor per block left, all came back, and on a GPU as many copies went each way."""
    names = ("offload-activations", "offload-activations: back", "offload-activations: forwards")
    out, back, forwards = (trace.call_counts.get(name, 0) for name in names)
    figures = {"out": out, "back": back, "forwards": forwards, "expected": trace.micro_batches}
    if forwards < max(1, trace.micro_batches):
        told = f"{out} saved tensors went to the host, a block's worth in {forwards} of {trace.micro_batches} forwards"
        return inactive(told + ("" if out else _too_small(engine, options)), **figures)
    if back < trace.blocks * trace.micro_batches:
        return inactive(f"{out} saved tensors went to the host and {back} came back", **figures)
    if engine.device.type == "cuda" and trace.kernels:
        copies = {way: trace.copies.get(way, 0) for way in ("DtoH", "HtoD")}
        if copies["DtoH"] < out or copies["HtoD"] < back or trace.memcpy_streams < 1:
            told = f"{copies['DtoH']} copies to the host and {copies['HtoD']} back, {trace.memcpy_streams} side streams"
            return inactive(f"{out} saved tensors were to leave and {back} to come back; seen: {told}", **figures)
    return active(f"{out} saved tensors waited on the host in {forwards} forwards, {back} came back", **figures)


def _too_small(engine: Engine, options: Options) -> str:
    """Why nothing left, where size is the reason: what the hooks remember, whose largest tensor may be older than the watched step."""
    from gptoughts.layers.support.activation_offload import LARGEST

    largest = engine.counters.call_counts[LARGEST]
    limit = f"below --layer.offload.least-bytes {options['least_bytes']}"
    return f": the largest saved tensor was {largest} bytes, {limit}" if largest else ""


LAYER = Layer(
    name="offload-activations",
    slot="offload",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    options={
        "least_bytes": Option(1 << 20, "smaller tensors stay", int),
        "ahead": Option(2, "tensors to fetch before the backward asks", int),
    },
    wraps=("forward_context",),
    clashes={
        "cuda-graph": "a recorded graph reuses the memory of what it saved, and copies on a side stream are no part of it"
    },
)
