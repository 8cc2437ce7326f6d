"""A training by `gptoughts.train` with bad steps at given batches of the data, which may be killed; for the tests of `train.bad_step`."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import gptoughts
from gptoughts.engine.engine import Engine
from tests.models.hf.hf_configs import write_config

BATCH = 4
PERIOD = 5
"""Steps between checkpoints."""
NATIVE = {"model.width": 32, "model.heads": 2, "model.depth": 2, "model.dropout": 0.1}


class Fault(gptoughts.Callback):
    """Makes the first tensor of weights infinite after batch N of the data for N in `weights`; the loss of batch N for N in `losses`;
    doubles that of batch N for N in `doubled`. May kill the process.

    What depends on the position in the data does not happen again after a rewind.
    """

    phase = "fault"

    def __init__(self, options: dict[str, Any], checkpoints: Path) -> None:
        self.weights, self.losses = options.get("weights", []), options.get("losses", [])
        self.doubled = options.get("doubled", [])
        self.killed, self.checkpoints = options.get("killed", 0), checkpoints
        self.batch = 0

    def on_start(self, engine: Engine, progress: Any) -> None:
        """Break the objective."""
        inner, self.batch = engine.objective, 1 + (progress.cursor.samples // BATCH if progress.cursor else 0)
        fault = self

        class Breaking(type(inner)):  # type: ignore[misc]
            def __call__(self, model: Any, batch: Any) -> torch.Tensor:
                loss = inner(model, batch)
                if not model.training:
                    return loss
                loss = loss * 2 if fault.batch in fault.doubled else loss
                return loss + math.inf if fault.batch in fault.losses else loss

        engine.objective = Breaking.__new__(Breaking)
        engine.objective.__dict__.update(inner.__dict__)

    def on_step(self, engine: Engine, progress: Any, stats: Any, last: bool) -> None:
        """Break a weight, or kill the process after batch `killed`."""
        done = progress.cursor.samples // BATCH
        self.batch = done + 1
        if done in self.weights:
            with torch.no_grad():
                next(iter(engine.bare.parameters())).fill_(math.inf)
        if done == self.killed:
            self._wait_for(f"step-{progress.step // PERIOD * PERIOD:06d}")
            os.kill(os.getpid(), signal.SIGKILL)

    def _wait_for(self, checkpoint: str) -> None:
        """Wait for the thread that writes it."""
        latest, deadline = self.checkpoints / "latest", time.monotonic() + 60
        while not latest.exists() or latest.read_text(encoding="ascii").strip() != checkpoint:
            assert time.monotonic() < deadline, checkpoint
            time.sleep(0.01)


def main(folder: Path, options: dict[str, Any]) -> None:
    """Train with a checkpoint every fifth step, and dropout, whose random draws a rewind must restore."""
    fields = {
        "data.path": str(folder / "text.txt"),
        "data.cache": str(folder / "cache"),
        "data.sequence_length": 32,
        "train.global_batch": BATCH,
        "log.every": 1,
        "eval.every": 5,
        "eval.batches": 1,
        "save.every": PERIOD,
        "save.keep": 9,
        "sample.tokens": 4,
        **NATIVE,
        **options["fields"],
    }
    if options.get("hf"):
        fields = {key: value for key, value in fields.items() if key not in NATIVE}
        fields |= {
            "model.config": str(write_config(folder / options["hf"], options["hf"], vocab_size=320)),
            "data.tokenizer": "bytes",
        }
    fault = Fault(options, folder / "run" / "checkpoints")
    gptoughts.train(
        {"name": "tiny", **fields} if options.get("hf") else "shakespeare-char",
        fields={} if options.get("hf") else fields,
        layers=options.get("layers", {}),
        run_dir=str(folder / "run"),
        numerics="off",
        callbacks=[fault],
    )


if __name__ == "__main__":
    from gptoughts.errors import GptoughtsError

    try:
        main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    except GptoughtsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
