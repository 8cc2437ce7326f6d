"""Log a step: loss, learning rate, speed, the parts of its time. A row is read one logged step late, so that nothing waits."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gptoughts.console import Console, count, duration, share
from gptoughts.engine.callback import Callback
from gptoughts.engine.engine import Engine
from gptoughts.engine.run_length import RunLength
from gptoughts.engine.trainer import Progress, StepStats
from gptoughts.run.step_time import NO_SPLIT, Sample, StepTimer
from gptoughts.run.throughput import Throughput
from gptoughts.run.tracking.sink import Sink


def every(period: int, step: int, last: bool) -> bool:
    """Return whether a callback is due: each `period` steps and at the last one; a period of 0 means only at the last."""
    return last or (period > 0 and step % period == 0)


@dataclass
class _Pending:
    """Values of a logged step that are being copied to the host."""

    values: Tensor
    """Loss sum, weight, gradient norm, busy seconds of each rank, sum and weight of each meter, `listing` values."""
    copied: Any
    """CUDA event of the copy; None on a CPU."""
    progress: Progress
    rate: float
    tokens: int
    seconds: float
    data_wait: float
    ranks: int
    """Ranks whose busy seconds are among the values; 0 with one process."""
    meters: tuple[str, ...]
    listing: Callable[[list[float]], dict[str, Any]] | None
    """Converts the last values to entries of the row, such as the load of each expert."""
    sample: Sample | None
    """Timestamps of this step, if it was timed."""
    steady_speed: float | None
    """Tokens per second of all steps after warm-up and compilation."""


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
    judge: Callable[[int, Mapping[str, Any]], Mapping[str, Any]] = lambda step, row: {}
    """Returns more entries of a row from the others, such as what limits the run."""
    counts: Callable[[], Mapping[str, Any]] = dict
    """Returns the counters of every row, such as bad steps."""
    live: Callable[[], list[str]] = list
    """Returns more fields of the console's row, such as the use of the GPU."""
    _extra: dict[str, Any] = field(default_factory=dict)
    _timer: StepTimer | None = None
    _busy: float = math.nan
    """Seconds of the newest timed step in which this rank did not wait for others."""

    def on_start(self, engine: Engine, progress: Progress) -> None:
        """Measure speed from here."""
        self._previous = (progress, engine.counters.data_wait_seconds)
        self._first_step = progress.step
        self._timer = StepTimer(engine)
        if self._is_logged(progress.step + 1, False):
            self._timer.start()

    def on_end(self, engine: Engine, progress: Progress) -> None:
        """Time no further steps."""
        if self._timer is not None:
            self._timer.stop()

    def add(self, values: Mapping[str, Any]) -> None:
        """Add `values` to the next row."""
        self._extra.update(values)

    def due(self, step: int, last: bool) -> bool:
        """Due each `period` steps, at the first and at the last step, and before these; each step until the ETA's clock has started."""
        return self._steady is None or self._is_logged(step, last) or self._is_logged(step + 1, False)

    def _is_logged(self, step: int, last: bool) -> bool:
        return step == 1 or every(self.period, step, last)

    def on_step(self, engine: Engine, progress: Progress, stats: StepStats, last: bool) -> None:
        """Queue this step's values; write rows whose values have arrived."""
        if self._steady is None and progress.step - self._first_step >= self.steady_after:
            self._steady = progress
        if self._is_logged(progress.step, last):
            self._queue(engine, progress, stats, self._timer.stop() if self._timer else None)
        if self._timer is not None and self._is_logged(progress.step + 1, False):
            self._timer.start()
        while self._pending and (last or self._has_arrived(self._pending[0])):
            self._write(self._pending.popleft())

    def _queue(self, engine: Engine, progress: Progress, stats: StepStats, sample: Sample | None) -> None:
        before, waited = self._previous
        if sample is not None and sample.has_passed:
            self._busy = _busy(sample)
        meters = take_meters(engine)
        own = engine.ranks.sum(torch.stack([part for pair in meters.values() for part in pair])) if meters else None
        values = torch.cat([self._summed(engine, stats), own.float()]) if own is not None else self._summed(engine, stats)
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
                engine.ranks.size if engine.ranks.size > 1 else 0,
                tuple(meters),
                listing[1] if listing else None,
                sample,
                self._steady_speed(progress),
            )
        )
        self._previous = (progress, wait)

    def _summed(self, engine: Engine, stats: StepStats) -> Tensor:
        """Return loss sum, weight, gradient norm, then the busy seconds of every rank."""
        ranks = engine.ranks
        values = [stats.loss_sum.reshape(1), stats.weight.reshape(1), stats.grad_norm.float().reshape(1)]
        if ranks.size > 1:
            busy = torch.zeros(ranks.size, device=stats.loss_sum.device)
            busy[ranks.world.rank].fill_(self._busy)
            values.append(ranks.sum(busy))
        return torch.cat(values)

    def _steady_speed(self, progress: Progress) -> float | None:
        steady = self._steady
        if steady is None or progress.seconds <= steady.seconds:
            return None
        return (progress.tokens - steady.tokens) / (progress.seconds - steady.seconds)

    def _has_arrived(self, pending: _Pending) -> bool:
        return pending.copied is None or pending.copied.query()

    def _write(self, pending: _Pending) -> None:
        if pending.copied is not None:
            pending.copied.synchronize()
        loss_sum, weight, grad_norm, *own = pending.values.tolist()
        busy, own = own[: pending.ranks], own[pending.ranks :]
        progress = pending.progress
        loss = loss_sum / weight if weight > 0 else math.nan
        speed = pending.tokens / pending.seconds if pending.seconds > 0 else 0.0
        rates = self.throughput.row(speed)
        row = {
            "train/loss": _finite(loss),
            "train/grad_norm": _finite(grad_norm),
            "train/learning_rate": pending.rate,
            "train/num_tokens": progress.tokens,
            "train/epoch": self.length.epoch(progress) if self.length else None,
            "train/seconds": progress.seconds,
            "train/hours": progress.seconds / 3600,
            **rates,
            "perf/steady_tokens_per_second": pending.steady_speed,
            "perf/data_wait": pending.data_wait / pending.seconds if pending.seconds > 0 else 0.0,
            **(slowest_rank(busy) if busy else {}),
        }
        row |= {**NO_SPLIT, "perf/host_bound": None, "perf/cpu_seconds": None}
        if pending.sample is not None:
            timed = pending.sample.split()
            self._busy = math.nan if timed.busy is None else timed.busy
            row |= {**timed.row(), "perf/host_bound": timed.host_bound, "perf/cpu_seconds": timed.cpu_seconds}
        split = 2 * len(pending.meters)
        pairs = zip(pending.meters, own[:split:2], own[1:split:2], strict=True)
        row |= {f"train/{name}": _finite(total / part) for name, total, part in pairs if part}
        row |= pending.listing(own[split:]) if pending.listing else {}
        row |= self.counts()
        row |= self._extra
        self._extra = {}
        row |= self.judge(progress.step, row)
        self.sinks.log(progress.step, row)
        self.console.row(*self._fields(progress, row))

    def _fields(self, progress: Progress, row: Mapping[str, Any]) -> list[str]:
        total = f"/{self.length.steps}" if self.length and self.length.steps else ""
        left = self._seconds_left(progress)
        fields = [
            f"step {progress.step}{total}",
            "loss n/a" if row["train/loss"] is None else f"loss {row['train/loss']:.4f}",
            f"{count(row['perf/tokens_per_second'])} tok/s",
            f"MFU {share(row['perf/mfu'])}",
        ]
        fields += [*self.live(), *([f"ETA {duration(left)}"] if left is not None else [])]
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


def _busy(sample: Sample) -> float:
    seconds = sample.split().busy
    return math.nan if seconds is None else seconds


def slowest_rank(busy: Sequence[float]) -> dict[str, float | int | None]:
    """Return the keys of the rank with the longest step without waits, and how much longer it is than the median; None if unknown."""
    if any(math.isnan(seconds) for seconds in busy):
        return {"perf/slowest_rank": None, "perf/rank_spread": None}
    slowest = max(range(len(busy)), key=lambda rank: busy[rank])
    others = statistics.median(seconds for rank, seconds in enumerate(busy) if rank != slowest)
    return {"perf/slowest_rank": slowest, "perf/rank_spread": busy[slowest] / others - 1 if others > 0 else None}


def _finite(value: float) -> float | None:
    """Return the value; None if it is not finite, which JSON cannot hold."""
    return value if math.isfinite(value) else None


def take_meters(engine: Engine) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the objective's meters since the last call, each a (sum, weight) on the device, and reset them to zero."""
    meters = engine.objective.meters
    taken = {name: (total.clone(), weight.clone()) for name, (total, weight) in meters.items()}
    for pair in meters.values():
        for part in pair:
            part.zero_()
    return taken
