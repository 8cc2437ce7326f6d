"""One rank of a tracked run on the CPU, sampling GPUs of a fake NVML; killed after a step if one is given."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from typing import Any

from gptoughts.api import decide, train_resolved
from gptoughts.hardware.machine import probe
from gptoughts.run.tracking import sink

RECIPE: dict[str, Any] = {
    "name": "tracked", "data.path": "text.txt", "data.tokenizer": "bytes", "data.sequence_length": 16, "model.depth": 1,
    "model.width": 32, "model.heads": 2, "train.global_batch": 4, "train.steps": 12, "optim.warmup_steps": 0, "eval.every": 5,
    "eval.batches": 1, "sample.every": 3, "sample.tokens": 4, "save.every": 4, "save.keep": 9, "log.every": 1,
    "track.sinks": "plot,tensorboard,wandb", "track.sample_seconds": 0.05, "track.tags": "one, two", "track.group": "tests",
}  # fmt: skip
LAYERS = {"compile": "eager", "host": "system", "precision": "fp32"}


def main(run_dir: str, kill_at: int) -> None:
    """Train; the machine has no GPU for the plan, so that the model runs on the CPU."""
    from gptoughts.engine.callback import Callback

    class Kill(Callback):
        """kill -9 after a step."""

        def due(self, step: int, last: bool) -> bool:
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return False

    sink.CLOSE_SECONDS = 200.0  # on a busy machine wandb's own process needs longer to start than this short run takes
    setting = decide(RECIPE, layers=LAYERS, machine=replace(probe(), gpus=()))
    train_resolved(setting, None, run_dir, numerics="off", callbacks=(Kill(),), collectives="gloo")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
