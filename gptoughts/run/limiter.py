"""What limits a run: one verdict per log window with the figures behind it, and the next flag to try.

A verdict needs no profiler: it compares shares of the window's wall time that were measured anyway. What to try comes from `run/advice.py`.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import torch
from torch import nn

from gptoughts.console import Console, bytes_in_words, share
from gptoughts.engine.progress import COMMUNICATION, DATA_WAIT, OPTIMIZER, PARTS
from gptoughts.files import parse_json
from gptoughts.layers.support.compile import recompiles
from gptoughts.planning.evidence import StepTrace
from gptoughts.run.advice import Advisor

DATA, HOST, EXCHANGE, BANDWIDTH, COMPUTE, SAVING, STRAGGLER, THROTTLING = (
    "data",
    "host",
    "communication",
    "memory bandwidth",
    "compute",
    "checkpoint",
    "straggler",
    "throttling",
)
DEVICE = "device"
"""Compute or memory bandwidth: without a measured matmul rate or a datasheet peak they cannot be told apart."""
LIMITERS = (DATA, HOST, EXCHANGE, BANDWIDTH, COMPUTE, SAVING, STRAGGLER, THROTTLING, DEVICE)

SAMPLES = "system.jsonl"
"""System metrics in the run's folder, if a sampler writes them."""
NOTABLE = 0.15
"""Share of the wall time from which waiting for something is the verdict."""
HOST_SHARE = 0.5
"""Share of a step from which launching operators is the verdict: below it, most of the step is work."""
MATMUL_SHARE = 0.5
"""Share of the measured matmul rate from which a step is bound by compute."""
PEAK_SHARE = 0.35
"""The same of the datasheet peak, which no power limit sustains."""
UPDATE_SHARE = 0.3
"""Share of a step in the update, which reads and writes every weight and its state, from which memory bandwidth is the verdict."""
PAUSE_SHARE = 0.05
"""Share of the window in garbage collection from which it is named."""
ORDINARY = ("application clocks", "power cap")
"""Reasons for lower clocks of `hardware/gpu_sampler.py` that are settings of the machine, not faults."""


@dataclass(frozen=True)
class Window:
    """What was measured between two rows of the log."""

    row: Mapping[str, Any]
    """The row with its `time/` and `perf/` keys."""
    saving: float = 0.0
    """Share of the wall time that the run waited for checkpoints."""
    launching: float | None = None
    """Share of the training thread's CPU time that the operators of a step take when they have nothing to compute; None if unknown."""
    throttled: tuple[str, ...] = ()
    """NVML's reasons for lower clocks."""


@dataclass(frozen=True)
class Verdict:
    """What limits the window, and the figures behind it."""

    limiter: str
    figures: str
    share: float = 0.0


def judge(window: Window) -> Verdict | None:
    """Return the verdict of a window: the largest share of time spent waiting, else the hardware; None if the step was not timed."""
    row = window.row
    seconds = {part: row.get(f"time/{part}") for part in PARTS}
    if seconds[DATA_WAIT] is None:
        return None
    total = sum(value for value in seconds.values() if value is not None) or 1.0
    waits = list(_waits(window, {part: (value or 0.0) / total for part, value in seconds.items()}))
    largest = max(waits, key=lambda one: one.share, default=None)
    if largest is not None:
        return largest
    slowed = [reason for reason in window.throttled if reason not in ORDINARY]
    if slowed:
        return Verdict(THROTTLING, f"the GPU lowers its clocks: {', '.join(slowed)}")
    return _of_hardware(row, (seconds[OPTIMIZER] or 0.0) / total)


def _waits(window: Window, parts: Mapping[str, float]) -> Any:
    """Yield a verdict for everything that takes a notable share of the time and is not work."""
    row, on_gpu = window.row, window.row.get("perf/host_bound") is not None
    # A GPU has a queue: only the wait on its own timeline is lost. On a CPU the whole window is known.
    data = parts[DATA_WAIT] if on_gpu else float(row.get("perf/data_wait") or 0.0)
    spread, slowest = row.get("perf/rank_spread"), row.get("perf/slowest_rank")
    lost = spread / (1 + spread) if spread else 0.0
    exchanged = parts[COMMUNICATION] if row.get(f"time/{COMMUNICATION}") is not None else 0.0
    host = row.get("perf/host_bound")
    if not on_gpu and window.launching is not None:
        host = window.launching * max(0.0, 1 - data - exchanged)
    if window.saving >= NOTABLE:
        yield Verdict(SAVING, f"waiting for checkpoints takes {share(window.saving)} of the wall time", window.saving)
    if data >= NOTABLE:
        yield Verdict(DATA, f"waiting for batches takes {share(data)} of the steps", data)
    if lost >= NOTABLE:
        # It shows as communication on the other ranks, so the larger of both is its share.
        text = f"rank {slowest} takes {share(spread)} longer than the others, which wait for it"
        yield Verdict(STRAGGLER, text, max(lost, exchanged))
    elif exchanged >= NOTABLE:
        yield Verdict(EXCHANGE, f"exposed communication takes {share(exchanged)} of the step", exchanged)
    if host is not None and host >= HOST_SHARE:
        yield Verdict(HOST, f"launching operators takes {share(host)} of the step", host)


def _of_hardware(row: Mapping[str, Any], update: float) -> Verdict:
    of_gemm, mfu = row.get("perf/of_gemm"), row.get("perf/mfu")
    if update >= UPDATE_SHARE:
        return Verdict(BANDWIDTH, f"clipping and update take {share(update)} of the step")
    if of_gemm is not None:
        text = f"the model's matrix products run at {share(of_gemm)} of this machine's rate"
        return Verdict(COMPUTE if of_gemm >= MATMUL_SHARE else BANDWIDTH, text)
    if mfu is not None:
        return Verdict(COMPUTE if mfu >= PEAK_SHARE else BANDWIDTH, f"MFU {share(mfu)}")
    return Verdict(DEVICE, "no wait is notable; gptoughts bench gemm tells compute from memory bandwidth")


class Pauses:
    """Seconds in Python's garbage collector."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def __enter__(self) -> Pauses:
        gc.callbacks.append(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        gc.callbacks.remove(self._note)

    def _note(self, phase: str, info: Mapping[str, int]) -> None:
        if phase == "start":
            self._since = perf_counter()
        else:
            self.seconds += perf_counter() - self._since


def operator_seconds(repetitions: int = 50) -> float:
    """Measure what an operator costs this CPU when it has nothing to compute: forward and backward of a layer with one weight.

    Operators are counted as the watched step counts them. Takes about 50 ms, once per run.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # as run/step_trace.py
    from torch.profiler import ProfilerActivity, profile

    # Without initialization, which would take numbers from the generator of the training's dropout.
    layer, value = nn.utils.skip_init(nn.Linear, 1, 1), torch.ones(1, 1)

    def work() -> None:
        layer(value).sum().backward()

    work()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        work()
    counted = sum(event.count for event in profiler.key_averages() if event.key.startswith("aten::"))
    times = []
    for _ in range(repetitions):
        began = thread_time()
        work()
        times.append(thread_time() - began)
    return sorted(times)[repetitions // 2] / max(1, counted)


class Limiter:
    """Adds `perf/limiter`, `perf/advice` and the pauses to the rows, and prints a verdict where it changes."""

    def __init__(
        self,
        advisor: Advisor,
        console: Console,
        spent: Callable[[], Mapping[str, float]],
        pauses: Pauses,
        trace: Callable[[], StepTrace | None],
        samples: Path | None = None,
    ) -> None:
        """Judge windows. `spent` returns goodput's seconds by part, `trace` the watched step, `samples` is system.jsonl."""
        self._advisor, self._console, self._spent, self._pauses = advisor, console, spent, pauses
        self._trace, self._samples = trace, samples
        self._before: Mapping[str, float] | None = None
        self._paused = self._recompiled = 0.0
        self._cost: float | None = None
        self._said = ""
        self._advised: dict[str, str | None] = {}
        self.verdict: Verdict | None = None

    def __call__(self, step: int, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the keys of this row."""
        before, now = self._before, dict(self._spent())
        self._before = now
        paused, self._paused = self._pauses.seconds - self._paused, self._pauses.seconds
        recompiled, self._recompiled = len(recompiles()) - self._recompiled, len(recompiles())
        keys: dict[str, Any] = {"perf/limiter": None, "perf/advice": None, "perf/gc_seconds": paused}
        keys["perf/recompiles"] = max(0, int(recompiled))
        if before is None or row.get("perf/steady_tokens_per_second") is None:
            return keys  # compilation and warm-up are no limit
        wall = sum(now.values()) - sum(before.values())
        saving = (now["checkpoint"] - before["checkpoint"]) / wall if wall > 0 else 0.0
        found = judge(Window(row, saving, self._launching(row), _throttled(self._samples)))
        if found is None:
            return keys
        advice = self._advice(found.limiter)
        self.verdict = found
        extra = f"; garbage collection takes {share(paused / wall)}" if wall > 0 and paused / wall >= PAUSE_SHARE else ""
        extra += f"; {keys['perf/recompiles']} recompilations" if keys["perf/recompiles"] else ""
        text = f"limited by {found.limiter}: {found.figures}{extra}" + (f". Try: {advice}" if advice else "")
        if found.limiter != self._said:
            self._console.say(f"step {step}  {text}")
            self._said = found.limiter
        return {**keys, "perf/limiter": found.limiter, "perf/advice": advice}

    def summary(self) -> list[str]:
        """Return the lines for the end of the run: the last verdict, and what unused memory allows."""
        lines = []
        if self.verdict is not None:
            advice = self._advice(self.verdict.limiter)
            text = f"limit       {self.verdict.limiter}: {self.verdict.figures}"
            lines.append(f"{text}. Try: {advice}" if advice else text)
        trace = self._trace()
        unused = self._advisor.upward(trace.peak_bytes if trace is not None else None)
        return [*lines, f"memory      {unused}"] if unused else lines

    def _advice(self, limiter: str) -> str | None:
        """Return what to try. Found once per limiter: planning takes milliseconds, and the plan of a run does not change."""
        if limiter not in self._advised:
            self._advised[limiter] = self._advisor.advise(limiter)
        return self._advised[limiter]

    def _launching(self, row: Mapping[str, Any]) -> float | None:
        """Return the share of a step's CPU time that its operators take when they have nothing to compute; None on a GPU."""
        trace, total = self._trace(), row.get("perf/cpu_seconds")
        if trace is None or not total:
            return None
        if self._cost is None:
            self._cost = operator_seconds()
        operators = sum(operator.calls for operator in trace.operators.values())
        return min(1.0, operators * self._cost / total)


def newest_sample(samples: Path | None) -> Mapping[str, Any]:
    """Return the last whole row of system.jsonl; empty without that file."""
    if samples is None or not samples.is_file():
        return {}
    with samples.open("rb") as file:
        file.seek(max(0, samples.stat().st_size - 16_384))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        try:
            row = parse_json(line)
        except ValueError:
            continue  # cut by the writer, or by the seek
        return row if isinstance(row, dict) else {}
    return {}


def _throttled(samples: Path | None) -> tuple[str, ...]:
    reasons = newest_sample(samples).get("gpu/throttle")
    return tuple(map(str, reasons)) if isinstance(reasons, list) else ()


def gpu_fields(samples: Path) -> list[str]:
    """Return `GPU 97 %` and `71.20 GiB` from the newest system sample for the live row; none that are unknown."""
    row = newest_sample(samples)
    used, memory = row.get("gpu/utilization"), row.get("gpu/memory_bytes")
    fields = [f"GPU {used:.0f} %"] if isinstance(used, int | float) else []
    return fields + ([bytes_in_words(memory)] if isinstance(memory, int | float) else [])
