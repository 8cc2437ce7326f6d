"""Memory that ran out: told from other errors, and the smaller micro-batch that a run goes on with, kept in its folder."""

from __future__ import annotations

import gc
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from gptoughts.errors import RunError

FILE = "micro_batch.json"
CPU_WORDS = ("DefaultCPUAllocator", "can't allocate memory")


class OutOfMemory(RunError):
    """Memory ran out where the process itself cannot go on; started again, it continues with `sequences` per forward.

    The exit code is that of a temporary failure: whoever started the run may start it again.
    """

    exit_code = 75

    def __init__(self, text: str, sequences: int | None) -> None:
        super().__init__(text)
        self.sequences = sequences


def ran_out(error: BaseException) -> bool:
    """Whether the device, or on a CPU the process, had no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and all(word in str(error) for word in CPU_WORDS)


def release(device: torch.device) -> None:
    """Free what a forward or backward on `device` held when it failed. Call it outside of the handler, whose traceback holds the frames.

    After a failed backward on a CPU the tasks that were waiting stay in the calling thread's queue, and with them the activations that
    they saved, until that thread runs a backward again: https://github.com/pytorch/pytorch/issues/82218. The next forward has to find
    its memory before that, so the smallest of backwards runs here.
    """
    with torch.enable_grad():
        torch.zeros((), device="cpu", requires_grad=True).clone().backward()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def smaller(sequences: int, share: int) -> int | None:
    """The largest divisor of `share` that is at most half of `sequences`; None where one sequence is already too much."""
    return next((count for count in range(sequences // 2, 0, -1) if share % count == 0), None)


@dataclass(frozen=True)
class Kept:
    """The micro-batch that memory left to a run."""

    sequences: int
    planned: int


def keep(folder: Path, kept: Kept) -> None:
    """Write it down for the next start."""
    part = folder / f"{FILE}.{os.getpid()}.part"  # ranks may run out together
    part.write_text(json.dumps(vars(kept), indent=1) + "\n", encoding="utf-8")
    part.replace(folder / FILE)


def recall(folder: Path, planned: int) -> Kept | None:
    """What an earlier start wrote down, where it was planned as now and so still counts. Raises RunError for a file that is something else."""
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kept = Kept(int(content["sequences"]), int(content["planned"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be read: {error}; delete it to begin with the planned micro-batch") from None
    return kept if kept.planned == planned and 0 < kept.sequences < planned else None
