"""The child process of one bench variant: it builds an engine and trains steps on request. `children.py` is its parent.

Allocator, compiler and autotuner state leaks between variants of one process, and environment variables only take effect before torch is
imported: every variant has its own process and environment.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import IO, TYPE_CHECKING, Any

from gptoughts.api import decide
from gptoughts.console import print_line
from gptoughts.errors import GptoughtsError, LayerError
from gptoughts.processes import receive, send

if TYPE_CHECKING:
    from gptoughts.diagnostics.bench.training import Training

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Job:
    """A variant as command line options with a layer for every slot, and the digest of the resulting plan."""

    recipe: str | None
    profile: str
    fields: Mapping[str, str]
    layers: Mapping[str, Any]
    digest: str
    plugins: tuple[str, ...] = ()
    warmup_steps: int = 2
    """Uncounted steps: the first compiles, the second is the first with optimizer state."""
    weights_seed: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the plan."""
    rank_environments: Sequence[Mapping[str, str]] = ()
    """Variables of every rank's plan; empty for a single process outside of a process group."""
    profiled_steps: int = 0
    """Steps after the watched one whose time in collectives is measured."""

    def to_json(self) -> dict[str, Any]:
        """Return the job as JSON values."""
        return asdict(self)


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Receive a job, answer when it is warm, then train the requested steps until the parent closes the pipe."""
    began = perf_counter()
    job = Job(**receive(requests)[0])
    failure = _failure(lambda: _train(job, requests, answers, began))
    if failure is not None:
        send(answers, failure)
        sys.exit(1)


def _train(job: Job, requests: IO[bytes], answers: IO[bytes], began: float) -> None:
    setting = decide(job.recipe, job.profile, job.fields, job.layers, job.plugins)
    if setting.plan.digest() != job.digest:
        raise LayerError(f"bench: the plan changed between parent and child:\n{setting.plan.table()}")
    from gptoughts.diagnostics.bench.training import open_training

    with open_training(setting, job.weights_seed) as training:
        send(answers, _ready(job, training, began))
        while True:
            try:
                steps = receive(requests)[0]["steps"]
            except EOFError:
                return
            seconds = training.steps(steps)
            losses = training.losses.taken()
            peak, clock = training.peak_bytes(), clock_mhz()
            send(answers, {"seconds": seconds, "steps": steps, "losses": losses, "peak_bytes": peak, "clock_mhz": clock})


def _ready(job: Job, training: Training, began: float) -> dict[str, Any]:
    """Warm up and run the watched step; return evidence, seconds and memory."""
    import torch

    first = training.steps(1)
    training.steps(job.warmup_steps - 1)
    peak = training.peak_bytes()  # before the profiler, whose records take memory
    seen = training.watched()
    collectives = training.collectives(job.profiled_steps)
    if training.engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(training.engine.device)
    else:
        training.bytes_before = None  # VmHWM cannot be reset
    return {
        "evidence": [line.to_json() for line in seen],
        "first_step_seconds": first,
        "seconds": perf_counter() - began,
        "losses": training.losses.taken(),
        "peak_bytes": peak,
        "held_bytes": training.held_bytes(),
        "free_bytes": training.free_bytes(),
        "device": training.engine.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "collectives": [asdict(step) for step in collectives],
        "settings": training.settings(),
        **training.figures(),
    }


def clock_mhz() -> int | None:
    """Return the current SM clock of the GPU; None on a CPU or if NVML does not report it."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        return torch.cuda.clock_rate()
    except Exception as error:  # no NVML package or no clock on this GPU: error classes differ
        print_line(f"clock: not read ({type(error).__name__}: {error})", sys.stderr)
        return None


def _failure(work: Callable[[], None]) -> dict[str, Any] | None:
    """Run `work`; return its error as a message for the parent, None if there was none."""
    try:
        work()
    except GptoughtsError as error:
        return {"failed": {"kind": type(error).__name__, "message": str(error)}}
    except Exception as error:
        import traceback

        import torch

        traceback.print_exc()
        full = isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        kind = OUT_OF_MEMORY if full else type(error).__name__
        return {"failed": {"kind": kind, "message": lines[0][:300] if lines else ""}}
    return None
