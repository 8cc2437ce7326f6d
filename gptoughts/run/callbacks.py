"""The callbacks of a run: log, evaluate, sample, save. Only callbacks that touch weights wait for the device."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gptoughts.console import Console, count, duration, share
from gptoughts.engine.callback import Callback
from gptoughts.engine.checkpoint.store import Snapshot
from gptoughts.engine.checkpoint.writer import Writer
from gptoughts.engine.distributed.replicas import demand_equal_weights
from gptoughts.engine.engine import Engine
from gptoughts.engine.run_length import RunLength
from gptoughts.engine.trainer import Progress, StepStats
from gptoughts.errors import RunError
from gptoughts.inference.eval.perplexity import mean_loss
from gptoughts.inference.eval.text_bytes import LabelBytes
from gptoughts.run.throughput import Throughput
from gptoughts.run.tracking.sink import Sink


def every(period: int, step: int, last: bool) -> bool:
    """Return whether a callback is due: each `period` steps and at the last one; a period of 0 means only at the last."""
    return last or (period > 0 and step % period == 0)


@dataclass
class _Pending:
    """Values of a logged step that are being copied to the host."""

    values: Tensor
    """Loss sum, weight, gradient norm, then sum and weight of each meter, then `listing` values."""
    copied: Any
    """CUDA event of the copy; None on a CPU."""
    progress: Progress
    rate: float
    tokens: int
    seconds: float
    data_wait: float
    meters: tuple[str, ...]
    listing: Callable[[list[float]], dict[str, Any]] | None
    """Converts the last values to entries of the row, such as the load of each expert."""


@dataclass
class Log(Callback):
    """Writes rows of loss, learning rate and speed. A row is read back one logged step late, so that nothing waits for the device."""

    phase = "log"
    on_stop = True
    period: int
    sinks: Sink
    console: Console
    throughput: Throughput
    length: RunLength | None = None
    """None leaves out epochs and the estimated time of arrival."""
    steady_after: int = 1
    """Steps of this process that the ETA leaves out: compilation, warm-up and the watched step."""
    _pending: deque[_Pending] = field(default_factory=deque)
    _previous: tuple[Progress, float] = (Progress(), 0.0)
    _first_step: int = 0
    _steady: Progress | None = None
    _extra: dict[str, Any] = field(default_factory=dict)

    def on_start(self, engine: Engine, progress: Progress) -> None:
        """Measure speed from here."""
        self._previous = (progress, engine.counters.data_wait_seconds)
        self._first_step = progress.step

    def add(self, values: Mapping[str, Any]) -> None:
        """Add `values` to the next row."""
        self._extra.update(values)

    def due(self, step: int, last: bool) -> bool:
        """Due each `period` steps, at the first and at the last step; each step is seen until the ETA's clock has started."""
        return self._steady is None or self._is_logged(step, last)

    def _is_logged(self, step: int, last: bool) -> bool:
        return step == 1 or every(self.period, step, last)

    def on_step(self, engine: Engine, progress: Progress, stats: StepStats, last: bool) -> None:
        """Queue this step's values; write rows whose values have arrived."""
        if self._steady is None and progress.step - self._first_step >= self.steady_after:
            self._steady = progress
        if self._is_logged(progress.step, last):
            self._queue(engine, progress, stats)
        while self._pending and (last or self._has_arrived(self._pending[0])):
            self._write(self._pending.popleft())

    def _queue(self, engine: Engine, progress: Progress, stats: StepStats) -> None:
        before, waited = self._previous
        loss_sum = engine.ranks.sum(stats.loss_sum)
        meters = take_meters(engine)
        own = engine.ranks.sum(torch.stack([part for pair in meters.values() for part in pair])) if meters else None
        values = torch.stack([loss_sum, stats.weight, stats.grad_norm.float()])
        values = values if own is None else torch.cat([values, own.float()])
        listing = engine.objective.listing()
        values = values if listing is None else torch.cat([values, listing[0]])
        host = values.to("cpu", non_blocking=True)
        copied = None
        if values.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        wait = engine.counters.data_wait_seconds
        self._pending.append(
            _Pending(
                host,
                copied,
                progress,
                stats.rate,
                progress.tokens - before.tokens,
                progress.seconds - before.seconds,
                wait - waited,
                tuple(meters),
                listing[1] if listing else None,
            )
        )
        self._previous = (progress, wait)

    def _has_arrived(self, pending: _Pending) -> bool:
        return pending.copied is None or pending.copied.query()

    def _write(self, pending: _Pending) -> None:
        if pending.copied is not None:
            pending.copied.synchronize()
        loss_sum, weight, grad_norm, *own = pending.values.tolist()
        progress = pending.progress
        loss = _checked_loss(progress, loss_sum, weight, grad_norm)
        speed = pending.tokens / pending.seconds if pending.seconds > 0 else 0.0
        rates = self.throughput.row(speed)
        row = {
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "train/learning_rate": pending.rate,
            "train/num_tokens": progress.tokens,
            "train/epoch": self.length.epoch(progress) if self.length else None,
            "train/seconds": progress.seconds,
            **rates,
            "perf/data_wait": pending.data_wait / pending.seconds if pending.seconds > 0 else 0.0,
        }
        split = 2 * len(pending.meters)
        pairs = zip(pending.meters, own[:split:2], own[1:split:2], strict=True)
        row |= {f"train/{name}": total / part for name, total, part in pairs if part}
        row |= pending.listing(own[split:]) if pending.listing else {}
        row |= self._extra
        self._extra = {}
        self.sinks.log(progress.step, row)
        self.console.row(*self._fields(progress, row))

    def _fields(self, progress: Progress, row: Mapping[str, Any]) -> list[str]:
        total = f"/{self.length.steps}" if self.length and self.length.steps else ""
        left = self._seconds_left(progress)
        fields = [
            f"step {progress.step}{total}",
            f"loss {row['train/loss']:.4f}",
            f"{count(row['perf/tokens_per_second'])} tok/s",
            f"MFU {share(row['perf/mfu'])}",
        ]
        fields += [f"ETA {duration(left)}"] if left is not None else []
        fields += [f"data wait {share(row['perf/data_wait'])}"]
        return fields + ([f"of GEMM {share(row['perf/of_gemm'])}"] if row["perf/of_gemm"] is not None else [])

    def _seconds_left(self, progress: Progress) -> float | None:
        """Return the estimated seconds to the end at the steady speed; None before it is known."""
        if self.length is None:
            return None
        steady, per_step = self._steady, None
        if steady is not None and progress.step > steady.step:
            per_step = (progress.seconds - steady.seconds) / (progress.step - steady.step)
        return self.length.seconds_left(progress, per_step)


def _checked_loss(progress: Progress, loss_sum: float, weight: float, grad_norm: float) -> float:
    """Return the loss of a step. Raises RunError if no label counts or a value is not finite."""
    if weight == 0:
        raise RunError(f"step {progress.step}: no label counts in this batch, up to data cursor {progress.cursor}")
    loss = loss_sum / weight
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise RunError(
            f"step {progress.step}: loss or gradient norm is not finite, up to data cursor {progress.cursor}; "
            "earlier checkpoints are intact",
            found=f"loss {loss}, gradient norm {grad_norm}",
            fix="a lower --optim.learning-rate, or --layer.precision fp32",
        )
    return loss


def take_meters(engine: Engine) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the objective's meters since the last call, each a (sum, weight) on the device, and reset them to zero."""
    meters = engine.objective.meters
    taken = {name: (total.clone(), weight.clone()) for name, (total, weight) in meters.items()}
    for pair in meters.values():
        for part in pair:
            part.zero_()
    return taken


@dataclass
class Evaluate(Callback):
    """Validation loss in the precision of evaluation, and the task's own scores. Ends the run early when patience is exhausted."""

    phase = "evaluation"
    touches_weights = True
    period: int
    batches: Callable[[], Iterable[Mapping[str, Any]]]
    sinks: Sink
    console: Console
    patience: int = 0
    """Validations without improvement after which the run ends; 0 never ends it."""
    scores: Callable[[Engine], Mapping[str, float]] | None = None
    """Scores of the task and of benchmarks. `f1`, higher being better, replaces the loss as the criterion of the best checkpoint."""
    label_bytes: LabelBytes | None = None
    """Counts the bytes of the labels; None where they are not all of a text."""
    result: tuple[int, float] | None = None
    """(step, loss) of the newest validation."""
    criterion: tuple[int, float] | None = None
    """(step, value) by which the best checkpoint is chosen; lower is better."""
    _best: float = math.inf
    _stale: int = 0
    _ended: int | None = None

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs: best value, validations since then, patience."""
        best = self._best if math.isfinite(self._best) else None
        return {"best": best, "stale": self._stale, "ended": self._ended, "patience": self.patience}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned. A different patience starts counting anew."""
        self._best = math.inf if state.get("best") is None else state["best"]
        if state.get("patience") == self.patience:
            self._stale, self._ended = state.get("stale", 0), state.get("ended")

    def exhausted(self, progress: Progress) -> bool:
        """Return whether patience ended before this step. One more step is made after it, so that the last step runs all callbacks."""
        return self._ended is not None and progress.step > self._ended

    def due(self, step: int, last: bool) -> bool:
        """Due each `period` steps and at the last."""
        return every(self.period, step, last)

    def on_step(self, engine: Engine, progress: Progress, stats: StepStats, last: bool) -> None:
        """Validate and write a row."""
        demand_equal_weights(engine)
        batches = self.batches() if self.label_bytes is None else self.label_bytes.counted(self.batches())
        loss, labels = mean_loss(engine, batches)  # type: ignore[arg-type]
        take_meters(engine)  # drop what validation added to the training meters
        scores = self.scores(engine) if self.scores else {}
        self.result = (progress.step, loss)
        self.criterion = (progress.step, -scores["f1"] if "f1" in scores else loss)
        row = {"eval/loss": loss, "eval/labels": labels}
        row |= self.label_bytes.row(engine, loss, labels) if self.label_bytes else {}
        row |= {f"eval/{name}": value for name, value in scores.items()}
        self.sinks.log(progress.step, {**row, "train/num_tokens": progress.tokens})
        shown = "".join(f"  {name} {value:.4g}" for name, value in scores.items())
        self.console.say(f"step {progress.step}  validation loss {loss:.4f} over {count(labels)} labels{shown}")
        self._update_best(progress.step, last)

    def _update_best(self, step: int, last: bool) -> None:
        assert self.criterion is not None
        better = self.criterion[1] < self._best
        self._best, self._stale = min(self._best, self.criterion[1]), 0 if better else self._stale + 1
        if self.patience and self._stale >= self.patience and self._ended is None and not last:
            self._ended = step
            self.console.say(f"step {step}  early stop: no improvement in {self._stale} validations (eval.patience)")


@dataclass
class Sample(Callback):
    """Prints a short text generated by the current weights."""

    phase = "sample"
    touches_weights = True
    period: int
    write: Callable[[Engine], str]
    console: Console
    text: str = ""

    def due(self, step: int, last: bool) -> bool:
        """Due each `period` steps and at the last."""
        return every(self.period, step, last)

    def on_step(self, engine: Engine, progress: Progress, stats: StepStats, last: bool) -> None:
        """Generate and print."""
        self.text = self.write(engine)
        if self.text:
            self.console.say(f"step {progress.step}  sample:\n{self.text}\n")


@dataclass
class Save(Callback):
    """Saves checkpoints in the background while training continues; waits for the last one."""

    phase = "save"
    touches_weights = True
    on_stop = True
    period: int
    writer: Writer | None
    """None on ranks that do not write."""
    take: Callable[[Engine, Progress], Snapshot | None]
    """A collective. Returns None on ranks that do not write."""
    criterion: Callable[[], tuple[int, float] | None] = lambda: None
    """(step, value) of the newest validation, lower being better."""

    def due(self, step: int, last: bool) -> bool:
        """Due each `period` steps and at the last."""
        return every(self.period, step, last)

    def on_step(self, engine: Engine, progress: Progress, stats: StepStats, last: bool) -> None:
        """Copy the state and hand it to the writer. Raises RunError for weights after a loss or gradient that is not finite."""
        finite = bool(torch.isfinite(stats.grad_norm).item()) and bool(torch.isfinite(stats.loss_sum).item())
        if not finite:
            raise RunError(f"step {progress.step}: gradient is not finite; no checkpoint is written, earlier ones are intact")
        demand_equal_weights(engine)
        taken = self.take(engine, progress)
        if self.writer is None or taken is None:
            return
        newest = self.criterion()
        value = newest[1] if newest is not None and newest[0] == progress.step else None
        self.writer.save(taken, value)
        if last:
            self.writer.wait()
