"""A training by `gptoughts.train` whose weights break after given numbers of samples, and which may be killed; for the tests of rewinds."""

from __future__ import annotations

import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import gptoughts
from gptoughts.engine.engine import Engine

BATCH = 4


class Fault(gptoughts.Callback):
    """Makes a weight infinite after the updates that reached these numbers of samples; kills the process after `killed` of them."""

    def __init__(self, broken: list[int], killed: int) -> None:
        self.broken, self.killed = broken, killed

    def on_step(self, engine: Engine, progress: Any, stats: Any, last: bool) -> None:
        """Break or kill. What depends on the position in the data does not happen again after a rewind."""
        if progress.cursor.samples in self.broken:
            with torch.no_grad():
                next(iter(engine.bare.parameters()))[0, 0] = math.inf
        if progress.cursor.samples == self.killed:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, steps: int, limit: int, killed: int, broken: list[int]) -> None:
    """Train `steps` with a checkpoint every fifth and dropout, whose random draws a rewind must restore."""
    fields = {
        "data.path": str(folder / "text.txt"),
        "data.cache": str(folder / "cache"),
        "train.steps": steps,
        "train.global_batch": BATCH,
        "train.bad_step": "rewind",
        "train.bad_step_limit": limit,
        "log.every": 1,
        "eval.every": 5,
        "eval.batches": 1,
        "save.every": 5,
        "save.keep": 9,
        "sample.tokens": 4,
        "model.width": 32,
        "model.heads": 2,
        "model.depth": 2,
        "model.dropout": 0.1,
        "data.sequence_length": 32,
    }
    faults = [Fault([BATCH * one for one in broken], BATCH * killed)]
    gptoughts.train("shakespeare-char", fields=fields, run_dir=str(folder / "run"), numerics="off", callbacks=faults)


if __name__ == "__main__":
    from gptoughts.errors import GptoughtsError

    try:
        steps, limit, killed, *broken = map(int, sys.argv[2:])
        main(Path(sys.argv[1]), steps, limit, killed, broken)
    except GptoughtsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
