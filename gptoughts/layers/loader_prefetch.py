"""Batches are read and copied to the device while the step before them runs, so the GPU does not wait for data.

A thread fills a ring of pinned buffers and a side stream copies them; token ids travel as uint16 and are widened on the device.
A buffer is written again only when the copy out of it is over, so that no batch pins memory of its own.
It hurts on a CPU, where nothing is copied and the thread takes turns with the step. A batch that was read and not used is not lost:
the cursor travels with its batch, and what is saved is what was consumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gptoughts.planning.layer import (
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
    unproven,
)


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """Needs a device to copy to before it can gain anything."""
    if not case.on_gpu:
        yield slower("no copy to a device to hide; reading a batch takes microseconds", "docs/measurements/cpu/data.json")


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Put a prefetcher before the batches; its thread ends with the block."""
    from gptoughts.data.prefetch import Prefetcher

    before = engine.batches
    prefetcher = Prefetcher(before, engine.device, options["batches"])
    engine.batches = prefetcher
    try:
        yield
    finally:
        prefetcher.close()
        engine.batches = before


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Batches came from the thread; on a GPU a stream other than the compute stream copied them. The wait is told, not judged."""
    served: Any = getattr(engine.batches, "served", 0)
    share = trace.data_wait_seconds / trace.step_seconds if trace.step_seconds else 0.0
    if not served:
        return inactive("the watched batch was not read ahead")
    if engine.device.type == "cuda" and not trace.kernels:
        return unproven(f"{served} batches read ahead; the profiler saw no kernel, so no stream can be told", served=served)
    if engine.device.type == "cuda" and trace.memcpy_streams < 1:
        return inactive("no copy from host to device on a side stream in the watched step", wait=share)
    figures = {"served": served, "wait": share}
    text = f"{served} batches read ahead, {100 * share:.1f} % of the watched step spent waiting"
    if engine.device.type == "cuda":
        made = figures["pinned"] = getattr(getattr(engine.batches, "ring", None), "allocated", 0)
        text += f", through {made} pinned buffers"
    return active(text, **figures)


LAYER = Layer(
    name="prefetch",
    slot="loader",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    unmet=unmet,
    options={"batches": Option(2, "batches to read ahead", int)},
)
