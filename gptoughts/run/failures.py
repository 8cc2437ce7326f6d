"""Turn out-of-memory and lost-rank errors into one message; for OOM, save the smaller micro-batch for the restart."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed

from gptoughts.engine.engine import Engine
from gptoughts.engine.oom import OutOfMemory, ReducedMicroBatch, is_out_of_memory, write_reduced
from gptoughts.errors import RunError
from gptoughts.planning.environment import SHORTAGE
from gptoughts.run.memory_snapshot import memory_report


@contextmanager
def report_failures(engine: Engine, out: Path) -> Iterator[None]:
    """Save the smaller micro-batch before ranks exit; raise RunError for a lost rank or OOM outside the gradient."""
    share = engine.recipe.train.global_batch // engine.ranks.size
    planned = engine.reduced_from or engine.micro_batch or share
    try:
        yield
    except OutOfMemory as error:
        if error.sequences is not None:
            write_reduced(out, ReducedMicroBatch(error.sequences, planned))
            if SHORTAGE in os.environ:
                Path(os.environ[SHORTAGE]).write_text(f"{error}\n", encoding="utf-8")
        raise
    except RuntimeError as error:
        if engine.ranks.size > 1 and _lost(error):
            raise RunError(
                f"rank {engine.ranks.world.rank}: lost the connection to another rank, whose message names the cause",
                found=str(error).splitlines()[0][:200],
            ) from error
        if not is_out_of_memory(error):
            raise
        blocks = f"\n  {memory_report(out / 'memory.json')}" if engine.device.type == "cuda" else ""
        raise RunError(
            f"out of memory: outside forward and backward{blocks}",
            found=str(error).splitlines()[0],
            fix="gptoughts plan, which lists options that need less memory, such as --layer.optimizer 8bit",
        ) from error


def _lost(error: RuntimeError) -> bool:
    """Return whether a collective failed because a peer is gone. NCCL has exception types for it, gloo only messages."""
    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, torch.distributed.DistError) or any(words in str(error) for words in gone)
