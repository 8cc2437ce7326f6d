"""Turn out-of-memory errors into one message, and save the smaller micro-batch for the restart. Lost ranks: the failure watch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptoughts.engine.engine import Engine
from gptoughts.engine.oom import OutOfMemory, ReducedMicroBatch, is_out_of_memory, write_reduced
from gptoughts.errors import RunError
from gptoughts.planning.environment import SHORTAGE
from gptoughts.run.memory_snapshot import memory_report


@contextmanager
def report_failures(engine: Engine, out: Path) -> Iterator[None]:
    """Save the smaller micro-batch before ranks exit; raise RunError for OOM outside the gradient."""
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
        if not is_out_of_memory(error):
            raise
        blocks = f"\n  {memory_report(out / 'memory.json')}" if engine.device.type == "cuda" else ""
        raise RunError(
            f"out of memory: outside forward and backward{blocks}",
            found=str(error).splitlines()[0],
            fix="gptoughts plan, which lists options that need less memory, such as --layer.optimizer 8bit",
        ) from error
