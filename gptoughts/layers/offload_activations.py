"""Activations saved for the backward are kept in host memory: the device holds those of a few operators at a time.

A side stream copies each saved tensor to pinned memory during the forward and prefetches it for the backward. Weights and their casts
stay on the device, as do tensors below `least_bytes`. With recomputation only block inputs are saved and offloaded; with compiled blocks,
the tensors that the compiled graph saves. It hurts where the bus is slower than the forward: every byte crosses it twice, and 1 GiB each
way takes at least 34 ms on PCIe 4.0 x16 (32 GB/s). It needs as much pinned host memory, and the first step is slow while that is
allocated. Gradients are bit-identical. Llama-3.2-3B on an A100 with recomputation: 23.1 to 21.8 GiB, 7,309 to 7,301
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
from gptoughts.planning.memory_fit import SOURCE, memory_headroom


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """A known family, a GPU, and activations that do not fit."""
    if case.spec.family is None:
        yield unsupported("needs a model of a known family: its blocks are counted as proof")
        return
    if not case.on_gpu:
        yield slower("activations are in host memory already", "no GPU")
        return
    everything = memory_headroom(case)
    if everything is not None and everything.is_enough:
        yield slower(f"weights, optimizer and activations take {everything}", SOURCE)


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """On a GPU the activations of two blocks stay; the others are in host memory."""
    return replace(budget, moved=max(0.0, 1 - 2 / budget.depth)) if case.on_gpu else budget


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Install saved-tensor hooks around every training forward."""
    from gptoughts.layers.support.activation_offload import HostActivations

    offload = HostActivations(
        engine.bare, options["least_bytes"], options["ahead"], len(engine.blocks), engine.counters.call_counts
    )
    undo = engine.wrap_context("forward_context", offload.context)
    try:
        yield
    finally:
        undo()


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require at least one offloaded tensor per block and forward, as many restored, and on a GPU as many copies each way."""
    names = ("offload-activations", "offload-activations: back", "offload-activations: forwards")
    out, back, forwards = (trace.call_counts.get(name, 0) for name in names)
    figures = {"out": out, "back": back, "forwards": forwards, "expected": trace.micro_batches}
    if forwards < max(1, trace.micro_batches):
        text = f"{out} saved tensors offloaded, one per block in {forwards} of {trace.micro_batches} forwards"
        return inactive(text + ("" if out else _too_small(engine, options)), **figures)
    if back < trace.blocks * trace.micro_batches:
        return inactive(f"{out} saved tensors offloaded, {back} restored", **figures)
    if engine.device.type == "cuda" and trace.kernels:
        copies = {way: trace.copies.get(way, 0) for way in ("DtoH", "HtoD")}
        if copies["DtoH"] < out or copies["HtoD"] < back or trace.memcpy_streams < 1:
            ran = f"{copies['DtoH']} copies to the host, {copies['HtoD']} back, {trace.memcpy_streams} side streams"
            return inactive(f"{out} saved tensors to offload, {back} to restore; profiler saw {ran}", **figures)
    return active(f"{out} saved tensors offloaded in {forwards} forwards, {back} restored", **figures)


def _too_small(engine: Engine, options: Options) -> str:
    """Return the size limit as the reason for no offloading, if it is; the recorded largest tensor may predate the watched step."""
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
        "least_bytes": Option(1 << 20, "smallest tensor to offload, in bytes", int),
        "ahead": Option(2, "tensors to prefetch in the backward", int),
    },
    wraps=("forward_context",),
    clashes={
        "cuda-graph": "a recorded graph reuses the memory of its saved tensors, and copies on a side stream are not recorded"
    },
    memory_rank=60,
)
