"""A run that memory ran out for, or that lost a rank, ends with one message and, where another start would help, with what that start needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed

from gptoughts.engine.engine import Engine
from gptoughts.engine.oom import Kept, OutOfMemory, keep, ran_out
from gptoughts.errors import RunError
from gptoughts.run.memory_snapshot import memory_report

SHORTAGE = "GPTOUGHTS_SHORTAGE"
"""A file that whoever started the ranks looks into, to start them again."""


@contextmanager
def leaving(engine: Engine, out: Path) -> Iterator[None]:
    """Write the smaller micro-batch down before ranks leave; tell of memory that ran out outside of the gradient in one message."""
    share = engine.recipe.train.global_batch // engine.ranks.size
    planned = engine.reduced_from or engine.micro_batch or share
    try:
        yield
    except OutOfMemory as error:
        if error.sequences is not None:
            keep(out, Kept(error.sequences, planned))
            if SHORTAGE in os.environ:
                Path(os.environ[SHORTAGE]).write_text(f"{error}\n", encoding="utf-8")
        raise
    except RuntimeError as error:
        if engine.ranks.size > 1 and _lost(error):
            raise RunError(
                f"rank {engine.ranks.world.rank} lost the others: {str(error).splitlines()[0][:200]}\n"
                "  whichever rank left first says why"
            ) from error
        if not ran_out(error):
            raise
        held = f"\n  {memory_report(out / 'memory.json')}" if engine.device.type == "cuda" else ""
        raise RunError(
            f"memory ran out outside of forward and backward: {str(error).splitlines()[0]}\n"
            f"  try: --layer.optimizer 8bit, --layer.optimizer-offload state-on-cpu, or gptoughts plan, which names what needs less{held}"
        ) from error


def _lost(error: RuntimeError) -> bool:
    """Whether a collective failed because its partner is gone; NCCL has types for it, gloo only words."""
    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, torch.distributed.DistError) or any(words in str(error) for words in gone)
