"""Batches are read and copied to the device during the previous step, so the GPU does not wait for data.

A thread fills a ring of pinned buffers and a side stream copies them; token ids are copied as uint16 and widened on the device.
A buffer is reused only after its copy has finished, so pinned memory stays bounded.
It hurts on a CPU, where nothing is copied and the thread competes with the step. Batches that were read but not used are not lost:
every batch carries its cursor, and a checkpoint saves the cursor of the last consumed batch.
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
    """A GPU to copy to."""
    if not case.on_gpu:
        yield slower("no copy to a device; reading a batch takes microseconds", "docs/measurements/cpu/data.json")


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Wrap the batches in a prefetcher; its thread ends with the context."""
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
    """Require batches from the thread, and on a GPU a copy on a side stream. Data wait is reported, not judged."""
    served: Any = getattr(engine.batches, "served", 0)
    share = trace.data_wait_seconds / trace.step_seconds if trace.step_seconds else 0.0
    if not served:
        return inactive("the watched batch was not prefetched")
    if engine.device.type == "cuda" and not trace.kernels:
        return unproven(f"{served} batches prefetched; the profiler saw no kernel, so streams are unknown", served=served)
    if engine.device.type == "cuda" and trace.memcpy_streams < 1:
        return inactive("no copy from host to device on a side stream in the watched step", wait=share)
    figures = {"served": served, "wait": share}
    text = f"{served} batches prefetched, {100 * share:.1f} % of the watched step waiting for data"
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
    options={"batches": Option(2, "batches to prefetch", int)},
)
