"""Memory segments that grow in place: batches of varying size do not fragment GPU memory.

It helps on a nearly full GPU; its cost in time was not measured. It hurts where CUDA memory is shared between processes
(IPC), which expandable segments support only on recent drivers.
Source: torch's notes on CUDA memory management, `PYTORCH_ALLOC_CONF=expandable_segments:True`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from gptoughts.planning.layer import Case, Engine, Evidence, Layer, Options, Reason, StepTrace, active, inactive, unsupported

SETTING = "expandable_segments:True"


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """Linux, and no conflicting allocator setting."""
    if case.machine.system != "linux":
        yield unsupported(f"needs Linux, found {case.machine.system}")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        value = case.environment.get(name)
        if value is not None and SETTING not in value:
            yield unsupported(f"{name}={value} is set in the environment", remedy=f"unset {name}, or add {SETTING}")


def environment(case: Case, options: Options) -> Mapping[str, str]:
    """Return the allocator setting, which torch reads once, before the first tensor."""
    return {"PYTORCH_ALLOC_CONF": SETTING}


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Do nothing: the environment variable is enough."""
    yield


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require expandable segments in the allocator's snapshot."""
    import torch

    if engine.device.type != "cuda":
        return inactive("the run is not on a GPU")
    segments = torch.cuda.memory.memory_snapshot()
    grown = sum(1 for segment in segments if segment.get("is_expandable"))
    if grown:
        return active(f"{grown} of {len(segments)} segments are expandable", segments=len(segments), expandable=grown)
    return inactive(
        f"0 of {len(segments)} segments are expandable; PYTORCH_ALLOC_CONF={os.environ.get('PYTORCH_ALLOC_CONF', '')}"
    )


LAYER = Layer(
    name="expandable",
    slot="allocator",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    unmet=unmet,
    environment=environment,
    needs_gpu=True,
)
