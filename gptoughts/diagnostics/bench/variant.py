"""One variant in a process of its own: `children.py` starts it, sends it lines of JSON and reads its answers.

Allocator, compiler and autotuner leak from one variant into the next, and variables count only before torch is loaded. So every variant is
born with its own environment, builds its own engine, and then runs so many steps whenever it is told. Started by bench, never by a person.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import IO, TYPE_CHECKING, Any

from gptoughts.api import decide
from gptoughts.errors import GptoughtsError, LayerError

if TYPE_CHECKING:
    from gptoughts.diagnostics.bench.training import Training

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Job:
    """What a variant is: words as on the command line, every slot's layer among them, and the plan that must come of them."""

    recipe: str | None
    profile: str
    fields: Mapping[str, str]
    layers: Mapping[str, Any]
    digest: str
    plugins: tuple[str, ...] = ()
    warmup_steps: int = 2
    """Steps before anything is counted: the first compiles, the second is the first with optimizer state."""
    weights_seed: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the plan, which the process is started with."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def main() -> None:
    """Serve until the other end closes. Whatever is printed on the way goes to standard error; answers have a channel of their own."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    began = perf_counter()
    job = Job(**json.loads(sys.stdin.readline()))
    answer = _failure(lambda: _serve(job, answers, began))
    if answer is not None:
        _say(answers, answer)
        sys.exit(1)


def _serve(job: Job, answers: IO[str], began: float) -> None:
    setting = decide(job.recipe, job.profile, job.fields, job.layers, job.plugins)
    if setting.plan.digest() != job.digest:
        raise LayerError(f"the plan changed between two looks at this machine:\n{setting.plan.table()}")
    from gptoughts.diagnostics.bench.training import opened_training

    with opened_training(setting, job.weights_seed) as training:
        _say(answers, {"ready": _ready(job, training, began)})
        for line in sys.stdin:
            steps = json.loads(line)["steps"]
            seconds = training.steps(steps)
            losses = training.losses.taken()
            peak, clock = training.peak_bytes(), clock_mhz()
            ran = {"seconds": seconds, "steps": steps, "losses": losses, "peak_bytes": peak, "clock_mhz": clock}
            _say(answers, {"ran": ran})


def _ready(job: Job, training: Training, began: float) -> dict[str, Any]:
    """Warm up, watch a step, and tell what was seen and what it took."""
    import torch

    first = training.steps(1)
    training.steps(job.warmup_steps - 1)
    peak = training.peak_bytes()  # before the profiler, whose records would count
    seen = training.watched()
    if training.engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(training.engine.device)
    else:
        training.bytes_before = None  # a high-water mark cannot be taken back
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
        **training.figures(),
    }


def clock_mhz() -> int | None:
    """Clock of the GPU's multiprocessors right now; None on a CPU, or where NVML does not tell."""
    import torch

    if not torch.cuda.is_available():
        return None
    try:
        return torch.cuda.clock_rate()
    except Exception as error:  # no NVML package, or a part that does not tell, each with an error class of its own
        print(f"clock: not read ({type(error).__name__}: {error})", file=sys.stderr)
        return None


def _failure(work: Callable[[], None]) -> dict[str, Any] | None:
    """Run `work`. What went wrong, as the other end is told it; None where nothing did."""
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


def _say(answers: IO[str], what: dict[str, Any]) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
