"""Judge every step by its loss, gradient norm and labels: bad steps as `train.bad_step` says, loss spikes, the first loss.

On a GPU a step is read one step later, so that nothing waits for the device, and before an evaluation, a checkpoint and the end of the
run. All ranks read the same values at the same step, so they decide alike.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gptoughts.console import LOGGER
from gptoughts.data.table import positions
from gptoughts.engine.callback import Callback
from gptoughts.engine.engine import Engine
from gptoughts.engine.objectives.base import Batch
from gptoughts.engine.progress import Progress, StepStats
from gptoughts.errors import RunError, ToldElsewhere
from gptoughts.run.loss_spikes import LossSpikes

LAG = 1
"""Steps after which a GPU's values are read."""
FIRST_LOSS_TOLERANCE = 0.2
"""Largest relative distance of the first loss from the expected one without a warning: large heads begin up to 15 % above it."""
FIX = "docs/diverging.md; --train.bad-step skip or rewind, a lower --optim.learning-rate, or --layer.precision fp32"


class Rewind(Exception):
    """The run goes on from its last checkpoint, and passes over the data up to `samples`, counted over all ranks since the start."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples = samples


@dataclass
class _Pending:
    """Values of a step that are being copied to the host."""

    values: Tensor
    """Loss sum, weight, gradient norm; where the first loss is known in advance, its sum."""
    copied: Any
    """CUDA event of the copy; None on a CPU."""
    progress: Progress
    batch: Batch | None


@dataclass
class StepCheck(Callback):
    """Reads each step's loss, label count and gradient norm, and acts on a bad step: one that is not finite, or has no label.

    A bad step raises RunError or Rewind on every rank, or is counted where its update was left out. The batch is written to `out`.
    """

    phase = "log"
    on_stop = True
    out: Path | None = None
    """Folder for the batch of a bad step; None writes none."""
    rewinds: int | None = None
    """Rewinds of the run so far; None where the run cannot rewind."""
    sample_numbers: Callable[[np.ndarray], np.ndarray] | None = None
    """Maps positions in the data order to numbers of samples in the data."""
    rows: int | None = None
    """Vocabulary size of a model with random weights, from which the first loss follows; None checks no first loss."""
    spikes: LossSpikes = field(default_factory=LossSpikes)
    bad: int = 0
    """Bad steps whose update was left out."""
    in_a_row: int = 0
    _pending: deque[_Pending] = field(default_factory=deque)

    def state(self) -> dict[str, int]:
        """Return what a resumed run needs."""
        return {"bad": self.bad, "in_a_row": self.in_a_row}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        self.bad, self.in_a_row = int(state.get("bad", 0)), int(state.get("in_a_row", 0))

    def counts(self) -> dict[str, int]:
        """Return the entries of a row of metrics."""
        return {"train/bad_steps": self.bad + (self.rewinds or 0), "train/loss_spikes": self.spikes.count}

    def on_step(self, engine: Engine, progress: Progress, stats: StepStats, last: bool) -> None:
        """Queue this step's values, and judge the steps whose values are due. Raises RunError or Rewind for a bad step."""
        values = [stats.loss_sum.reshape(1), stats.weight.reshape(1), stats.grad_norm.reshape(1)]
        values += self._expected(engine, stats.batch)
        host = torch.cat([value.detach().double() for value in values]).to("cpu", non_blocking=True)
        copied = None
        if stats.loss_sum.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._pending.append(_Pending(host, copied, progress, stats.batch))
        self.settle(engine, 0 if last or copied is None else LAG)

    def settle(self, engine: Engine, left: int = 0) -> None:
        """Judge all queued steps but the newest `left`. The host waits for them."""
        while len(self._pending) > left:
            self._judge(engine, self._pending.popleft())

    def _expected(self, engine: Engine, batch: Batch | None) -> list[Tensor]:
        """Return the loss sum of a model that predicts every token alike, for the first step of random weights."""
        rows, self.rows = self.rows, None
        labels = engine.objective.label_weight(batch) if rows and batch is not None else None
        return [] if labels is None or rows is None else [math.log(rows) * engine.ranks.sum(labels).reshape(1)]

    def _judge(self, engine: Engine, step: _Pending) -> None:
        if step.copied is not None:
            step.copied.synchronize()
        loss_sum, weight, grad_norm, *expected = step.values.tolist()
        if weight > 0 and math.isfinite(loss_sum) and math.isfinite(grad_norm):
            self.in_a_row = 0
            number = step.progress.step
            for line in (*_first_loss(loss_sum / weight, weight, expected), *self.spikes.take(number, loss_sum / weight)):
                LOGGER.warning("step %d: %s", number, line)
            return
        self.in_a_row += 1
        loss = loss_sum / weight if weight > 0 else None
        what = "loss or gradient norm is not finite" if weight > 0 else "no label counts in this batch"
        problem = f"step {step.progress.step}: {what}, {self._place(engine, step)}"
        found = f"loss {'n/a' if loss is None else loss}, gradient norm {grad_norm}"
        limit = engine.recipe.train.bad_step_limit
        if engine.skips_bad_steps and self.in_a_row <= limit:
            self.bad += 1
            LOGGER.warning(
                "%s; its update is left out (%d in a row, at most %d). Found %s", problem, self.in_a_row, limit, found
            )
            return
        saved = self._save(engine, step, {"loss": str(loss), "grad_norm": str(grad_norm)})
        if self._may_rewind(engine):
            LOGGER.warning("%s; going back to the last checkpoint or the start%s. Found %s", problem, saved, found)
            raise Rewind((self._pending[-1] if self._pending else step).progress.cursor.samples)
        if not engine.ranks.first:
            raise ToldElsewhere
        raise RunError(f"{problem}{self._why_not(engine, limit)}{saved}; earlier checkpoints are intact", found=found, fix=FIX)

    def broken(self, engine: Engine, progress: Progress, what: str) -> None:
        """Act on weights that are not finite after an update, `what` says which. Raises Rewind; returns where the run must end.

        A collective in its effect: call it on every rank.
        """
        if self._may_rewind(engine):
            LOGGER.warning("step %d: %s not finite; going back to the last checkpoint or the start", progress.step, what)
            raise Rewind(progress.cursor.samples)

    def _may_rewind(self, engine: Engine) -> bool:
        settings = engine.recipe.train
        return settings.bad_step == "rewind" and self.rewinds is not None and self.rewinds < settings.bad_step_limit

    def _why_not(self, engine: Engine, limit: int) -> str:
        """Return words that say why the policy does not continue; empty for one that stops."""
        policy = engine.recipe.train.bad_step
        if policy == "stop":
            return ""
        if policy == "skip":
            return f"; {limit} before it were left out (train.bad_step_limit)"
        if self.rewinds is None:
            return "; train.bad_step = rewind needs a run with checkpoints"
        return f"; the run went back {self.rewinds} time{'' if self.rewinds == 1 else 's'} (train.bad_step_limit)"

    def _place(self, engine: Engine, step: _Pending) -> str:
        cursor, rows = step.progress.cursor, engine.recipe.train.global_batch
        if hasattr(cursor, "samples"):
            return f"samples {cursor.samples - rows} to {cursor.samples - 1} of the data order"
        return f"up to data cursor {cursor}"

    def _save(self, engine: Engine, step: _Pending, figures: Mapping[str, str]) -> str:
        """Write this rank's share of the batch and where its samples are in the data. Returns words that name the file."""
        if self.out is None or step.batch is None:
            return ""
        world, cursor = engine.ranks.world, step.progress.cursor
        tensors = {key: value.detach().cpu().contiguous() for key, value in step.batch.items()}
        if hasattr(cursor, "samples"):
            places = positions(cursor, engine.recipe.train.global_batch, world.rank, world.world_size)
            tensors["sample_positions"] = torch.from_numpy(places)
            if self.sample_numbers is not None:
                tensors["sample_numbers"] = torch.from_numpy(self.sample_numbers(places))
        share = f"-rank{world.rank}" if world.world_size > 1 else ""
        path = self.out / f"bad-step-{step.progress.step:06d}{share}.safetensors"
        place = json.dumps(cursor.to_json()) if hasattr(cursor, "to_json") else str(cursor)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path, {"step": str(step.progress.step), "cursor": place, **figures})
        except (OSError, SafetensorError) as error:
            LOGGER.warning("%s: cannot be written: %s", path, error)
            return ""
        return f"; the batch is in {path}"


def _first_loss(loss: float, weight: float, expected: list[float]) -> list[str]:
    """Return a line if the loss of the first step is far from that of a model that predicts every token alike."""
    if not expected or not expected[0] > 0:
        return []
    known = expected[0] / weight
    if abs(loss / known - 1) <= FIRST_LOSS_TOLERANCE:
        return []
    return [
        f"the first loss is {loss:.4f}, random weights give about {known:.4f}; "
        "check the labels, the initialization and the vocabulary size"
    ]
