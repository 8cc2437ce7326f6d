"""Out-of-memory errors: detect them, free what they held, and keep the smaller micro-batch in the run folder."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import torch

from gptoughts.errors import RunError
from gptoughts.files import load_json, write_json

FILE = "micro_batch.json"
CPU_WORDS = ("DefaultCPUAllocator", "can't allocate memory")


class OutOfMemory(RunError):
    """Out of memory where the process cannot continue; after a restart the run uses `sequences` per forward.

    The exit code is EX_TEMPFAIL, on which a launcher restarts the run.
    """

    exit_code = 75

    def __init__(self, problem: str, sequences: int | None, fix: str = "") -> None:
        super().__init__(problem, fix=fix)
        self.sequences = sequences


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the device, or on a CPU the process, is out of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and all(word in str(error) for word in CPU_WORDS)


def free_failed_step(device: torch.device) -> None:
    """Free the memory of a failed forward or backward on `device`. Call it outside of the handler, whose traceback holds the frames.

    After a failed backward on a CPU, queued autograd tasks keep their saved activations until the same thread runs a backward again
    (https://github.com/pytorch/pytorch/issues/82218), so a minimal backward runs here.
    """
    with torch.enable_grad():
        torch.zeros((), device="cpu", requires_grad=True).clone().backward()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def next_micro_batch(sequences: int, share: int) -> int | None:
    """Return the largest divisor of `share` that is at most half of `sequences`; None where `sequences` is 1."""
    return next((count for count in range(sequences // 2, 0, -1) if share % count == 0), None)


@dataclass(frozen=True)
class ReducedMicroBatch:
    """Micro-batch of a run after an out-of-memory error."""

    sequences: int
    planned: int


def write_reduced(folder: Path, kept: ReducedMicroBatch) -> None:
    """Write the record for the next start."""
    write_json(folder / FILE, vars(kept), shared=True)  # several ranks may write at once


def read_reduced(folder: Path, planned: int) -> ReducedMicroBatch | None:
    """Return the record of an earlier start; None if there is none or it has another planned size. Raises RunError for a damaged file."""
    path = folder / FILE
    try:
        content = load_json(path)
        kept = ReducedMicroBatch(int(content["sequences"]), int(content["planned"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: not readable ({error})", fix=f"rm {path}, to start with the planned micro-batch") from None
    return kept if kept.planned == planned and 0 < kept.sequences < planned else None
