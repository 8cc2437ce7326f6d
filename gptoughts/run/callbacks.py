"""What happens between steps: log, evaluate, sample, save. Only callbacks that touch weights wait for the device."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptoughts.config.model_spec import ModelSpec, flops_per_token
from gptoughts.console import Console, count, duration, share
from gptoughts.engine.checkpoint.store import Snapshot, Writer
from gptoughts.engine.engine import Engine
from gptoughts.engine.trainer import Progress, StepStats
from gptoughts.errors import RunError
from gptoughts.hardware.machine import Machine, World
from gptoughts.hardware.measured_peaks import reached
from gptoughts.inference.eval.perplexity import mean_loss
from gptoughts.planning.plan import Plan
from gptoughts.run.throughput import Mfu, utilization
from gptoughts.run.tracking.jsonl import Jsonl


def every(period: int, step: int, last: bool) -> bool:
    """Due each `period` steps, and at the last; a period of 0 leaves the last alone."""
    return last or (period > 0 and step % period == 0)


@dataclass
class _Pending:
    """Values of a logged step on their way to the host."""

    values: Tensor
    arrived: Any
    progress: Progress
    rate: float
    tokens: int
    seconds: float
    waited: float
    meters: tuple[str, ...] = ()
    """Names of the objective's own figures; their sums and weights stand behind the first three values."""
    listed: Callable[[list[float]], dict[str, Any]] | None = None
    """What makes entries of the row of the values that stand last, such as the load of each expert."""


@dataclass
class Log:
    """Rows of loss, rate and speed. Values are read one logged step later than they were made, so nobody waits for the device."""

    touches_weights = False
    on_stop = True
    period: int
    sinks: list[Jsonl]
    console: Console
    mfu: Mfu
    total_steps: int | None
    remaining: Callable[[Progress], float | None]
    of_gemm: Mfu = lambda speed: None
    """The share of this machine's own matrix products; None where they were not measured."""
    _pending: deque[_Pending] = field(default_factory=deque)
    _before: tuple[Progress, float] | None = None

    def start(self, progress: Progress, engine: Engine) -> None:
        """Speed is measured from here."""
        self._before = (progress, engine.counters.data_wait_seconds)

    def due(self, step: int, last: bool) -> bool:
        """Each `period` steps, at the first and at the last."""
        return step == 1 or every(self.period, step, last)

    def run(self, engine: Engine, progress: Progress, stats: StepStats, last: bool) -> None:
        """Queue this step's values; write those that have arrived."""
        before, waited = self._before or (Progress(), 0.0)
        loss_sum = engine.ranks.sum(stats.loss_sum)
        meters = take_meters(engine)
        own = engine.ranks.sum(torch.stack([part for pair in meters.values() for part in pair])) if meters else None
        values = torch.stack([loss_sum, stats.weight, stats.grad_norm.float()])
        values = values if own is None else torch.cat([values, own.float()])
        listing = engine.objective.listing()
        values = values if listing is None else torch.cat([values, listing[0]])
        host = values.to("cpu", non_blocking=True)
        arrived = None
        if values.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        wait = engine.counters.data_wait_seconds
        seconds = progress.seconds - before.seconds
        self._pending.append(
            _Pending(
                host,
                arrived,
                progress,
                stats.rate,
                progress.tokens - before.tokens,
                seconds,
                wait - waited,
                tuple(meters),
                listing[1] if listing else None,
            )
        )
        self._before = (progress, wait)
        while self._pending and (last or self._ready(self._pending[0])):
            self._write(self._pending.popleft())

    def _ready(self, pending: _Pending) -> bool:
        return pending.arrived is None or pending.arrived.query()

    def _write(self, pending: _Pending) -> None:
        if pending.arrived is not None:
            pending.arrived.synchronize()
        loss_sum, weight, grad_norm, *own = pending.values.tolist()
        progress = pending.progress
        if weight == 0:
            raise RunError(f"step {progress.step}: none of its labels counts, up to data cursor {progress.cursor}")
        loss = loss_sum / weight
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise RunError(
                f"loss {loss} and gradient norm {grad_norm} at step {progress.step}, up to data cursor {progress.cursor}\n"
                "  try: a lower --optim.learning-rate, or --layer.precision fp32; checkpoints from before are whole"
            )
        speed = pending.tokens / pending.seconds if pending.seconds > 0 else 0.0
        mfu, of_gemm = self.mfu(speed), self.of_gemm(speed)
        row = {
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "train/learning_rate": pending.rate,
            "train/tokens": progress.tokens,
            "train/seconds": progress.seconds,
            "perf/tokens_per_second": speed,
            "perf/mfu": mfu,
            "perf/of_gemm": of_gemm,
            "perf/data_wait": pending.waited / pending.seconds if pending.seconds > 0 else 0.0,
        }
        count_own = 2 * len(pending.meters)
        pairs = zip(pending.meters, own[:count_own:2], own[1:count_own:2], strict=True)
        row |= {f"train/{name}": total / share for name, total, share in pairs if share}
        row |= pending.listed(own[count_own:]) if pending.listed else {}
        for sink in self.sinks:
            sink.log(progress.step, row)
        of = f"/{self.total_steps}" if self.total_steps else ""
        left = self.remaining(progress)
        self.console.row(
            f"step {progress.step}{of}  loss {loss:.4f}  {count(speed)} tok/s  MFU {share(mfu)}"
            + (f"  of GEMM {share(of_gemm)}" if of_gemm is not None else "")
            + f"  data wait {share(row['perf/data_wait'])}"
            + (f"  ETA {duration(left)}" if left is not None else "")
        )


def yardsticks(spec: ModelSpec, plan: Plan, machine: Machine, world: World, console: Console) -> tuple[Mfu, Mfu]:
    """Shares of the datasheet's peak and of the products measured on this machine, by speed; their constants are told."""
    mfu, formula = utilization(spec, machine, world.world_size)
    of_gemm, ceiling = reached(flops_per_token(spec), machine, world, plan.gemm_dtype)
    console.say(formula)
    console.say(ceiling)
    return mfu, of_gemm


def take_meters(engine: Engine) -> dict[str, tuple[Tensor, Tensor]]:
    """The objective's own figures since they were last taken, each a sum and a weight on the device; they start again at zero."""
    meters = engine.objective.meters
    if not meters:
        return {}
    taken = {name: (total.clone(), weight.clone()) for name, (total, weight) in meters.items()}
    for pair in meters.values():
        for part in pair:
            part.zero_()
    return taken


@dataclass
class Evaluate:
    """Validation loss, on the weights of this step, in the precision that training evaluates in, and the task's own scores."""

    touches_weights = True
    on_stop = False
    period: int
    batches: Callable[[], Iterable[Mapping[str, Any]]]
    sinks: list[Jsonl]
    console: Console
    patience: int = 0
    """Validations without a better one after which the run ends; 0 never ends it."""
    scores: Callable[[Engine], Mapping[str, float]] | None = None
    """Figures of the task; `f1`, more being better, stands for the loss where the best validation is looked for."""
    result: tuple[int, float] | None = None
    """Step and loss of the newest validation."""
    mark: tuple[int, float] | None = None
    """Step and figure by which the best checkpoint is told, the least being best."""
    figures: Mapping[str, float] = field(default_factory=dict)
    _best: float = math.inf
    _stale: int = 0
    _ended: int | None = None

    def memory(self) -> dict[str, Any]:
        """What a resumed run must know of the validations before it."""
        best = self._best if math.isfinite(self._best) else None
        return {"best": best, "stale": self._stale, "ended": self._ended, "patience": self.patience}

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Take back what `memory` gave. Another patience than it was made with begins anew."""
        self._best = math.inf if memory.get("best") is None else memory["best"]
        if memory.get("patience") == self.patience:
            self._stale, self._ended = memory.get("stale", 0), memory.get("ended")

    def exhausted(self, progress: Progress) -> bool:
        """Whether patience ended before this step. One more step is made then, so that the last one is a whole one with its callbacks."""
        return self._ended is not None and progress.step > self._ended

    def due(self, step: int, last: bool) -> bool:
        """Each `period` steps and at the last."""
        return every(self.period, step, last)

    def run(self, engine: Engine, progress: Progress, stats: StepStats, last: bool) -> None:
        """Validate and write a row."""
        loss, labels = mean_loss(engine, self.batches())  # type: ignore[arg-type]
        take_meters(engine)  # what validation added is not training's
        self.figures = self.scores(engine) if self.scores else {}
        self.result = (progress.step, loss)
        self.mark = (progress.step, -self.figures["f1"] if self.figures else loss)
        row = {"eval/val_loss": loss, "eval/labels": labels, **{f"eval/{name}": value for name, value in self.figures.items()}}
        for sink in self.sinks:
            sink.log(progress.step, {**row, "train/tokens": progress.tokens})
        told = "".join(f"  {name} {value:.2f}" for name, value in self.figures.items())
        self.console.say(f"step {progress.step}  validation loss {loss:.4f} over {count(labels)} labels{told}")
        self._judge(progress.step, last)

    def _judge(self, step: int, last: bool) -> None:
        assert self.mark is not None
        better = self.mark[1] < self._best
        self._best, self._stale = min(self._best, self.mark[1]), 0 if better else self._stale + 1
        if self.patience and self._stale >= self.patience and self._ended is None and not last:
            self._ended = step
            self.console.say(f"step {step}  no better validation in {self._stale}: the run ends (eval.patience)")


@dataclass
class Sample:
    """A short text by the model as it is now."""

    touches_weights = True
    on_stop = False
    period: int
    write: Callable[[Engine], str]
    console: Console
    text: str = ""

    def due(self, step: int, last: bool) -> bool:
        """Each `period` steps and at the last."""
        return every(self.period, step, last)

    def run(self, engine: Engine, progress: Progress, stats: StepStats, last: bool) -> None:
        """Write the text to the console."""
        self.text = self.write(engine)
        if self.text:
            self.console.say(f"step {progress.step}  sample:\n{self.text}\n")


@dataclass
class Save:
    """A checkpoint, written while training goes on; the last one is waited for."""

    touches_weights = True
    on_stop = True
    period: int
    writer: Writer | None
    """None on ranks that do not write."""
    take: Callable[[Engine, Progress], Snapshot]
    evaluated: Callable[[], tuple[int, float] | None]
    saved: Path | None = None

    def due(self, step: int, last: bool) -> bool:
        """Each `period` steps and at the last."""
        return every(self.period, step, last)

    def run(self, engine: Engine, progress: Progress, stats: StepStats, last: bool) -> None:
        """Copy the state, hand it to the writer. Refuses weights after a loss or gradient that is not finite."""
        finite = bool(torch.isfinite(stats.grad_norm).item()) and bool(torch.isfinite(stats.loss_sum).item())
        if not finite:
            raise RunError(
                f"step {progress.step}: the gradient is not finite; no checkpoint is written, those from before are whole"
            )
        if self.writer is None:
            return
        newest = self.evaluated()
        val_loss = newest[1] if newest is not None and newest[0] == progress.step else None
        self.writer.save(self.take(engine, progress), val_loss)
        if last:
            self.writer.wait()
