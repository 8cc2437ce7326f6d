"""One rank of the failure tests: trains by `gptoughts.train`, and one rank goes wrong after a step, as its arguments say."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import gptoughts
from gptoughts.engine.engine import Engine

RANK = int(os.environ["RANK"])
STEP = 5


class Fault(gptoughts.Callback):
    """Goes wrong on rank 1 after step STEP, in the first attempt of torchrun."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder

    def on_step(self, engine: Engine, progress: Any, stats: Any, last: bool) -> None:
        """Kill, stop or delay this rank, or change its weights."""
        if progress.step != STEP or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            return
        if self.kind == "long":  # on one rank, within the limit of a callback and beyond that of a step
            time.sleep(6 if RANK == 0 else 0)
        if RANK != 1:
            return
        (self.folder / "fault").write_text(str(time.time()), encoding="utf-8")
        if self.kind in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if self.kind == "kill" else signal.SIGSTOP)
        if self.kind == "sleep":
            sleep_in_python()
        if self.kind == "weights":
            with torch.no_grad():
                next(iter(engine.bare.parameters()))[0, 0] += 0.25


def sleep_in_python() -> None:
    """The function that must appear in the stacks."""
    time.sleep(1000)


def main(kind: str, folder: Path) -> None:
    """Train eight steps with a checkpoint every second one."""
    text = folder / "text.txt"
    fields = {
        "data.path": str(text),
        "data.cache": str(folder / "cache"),
        "train.steps": 8,
        "log.every": 1,
        "eval.every": 4,
        "eval.batches": 2,
        "save.every": 2,
        "sample.tokens": 4,
        "model.width": 32,
        "model.heads": 2,
        "model.depth": 2,
        "data.sequence_length": 32,
    }
    gptoughts.train(
        "shakespeare-char",
        fields=fields,
        layers={"precision": "fp32"},
        run_dir=str(folder / "run"),
        numerics="off",
        callbacks=[Fault(kind, folder)],
    )


if __name__ == "__main__":
    from gptoughts.errors import GptoughtsError

    try:
        main(sys.argv[1], Path(sys.argv[2]))
    except GptoughtsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
