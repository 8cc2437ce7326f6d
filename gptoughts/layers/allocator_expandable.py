"""Memory segments that grow in place, so that batches of changing size leave no unusable gaps.

It buys room on a nearly full GPU; what it costs in time was not measured. It hurts where CUDA memory is shared between processes
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
    """Only Linux maps device memory this way."""
    if case.machine.system != "linux":
        yield unsupported(f"needs Linux, found {case.machine.system}")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        value = case.environment.get(name)
        if value is not None and SETTING not in value:
            yield unsupported(f"{name}={value} was set by you and wins", remedy=f"unset {name}, or add {SETTING}")


def environment(case: Case, options: Options) -> Mapping[str, str]:
    """The allocator reads its settings once, before the first tensor."""
    return {"PYTORCH_ALLOC_CONF": SETTING}


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Nothing is left to do in the process: the environment did it."""
    yield


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """The allocator's own snapshot says which segments can grow."""
    import torch

    if engine.device.type != "cuda":
        return inactive("the run is not on a GPU")
    segments = torch.cuda.memory.memory_snapshot()
    grown = sum(1 for segment in segments if segment.get("is_expandable"))
    if grown:
        return active(f"{grown} of {len(segments)} segments can grow", segments=len(segments), expandable=grown)
    return inactive(f"none of {len(segments)} segments can grow; PYTORCH_ALLOC_CONF={os.environ.get('PYTORCH_ALLOC_CONF', '')}")


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
