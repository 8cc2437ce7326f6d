"""Split sampled steps into their parts, by CUDA events on a GPU and by the clock on a CPU. Nothing waits for the device.

The step calls `Engine.mark` where a part begins; the timer listens only in the steps that it samples, so that other steps cost nothing.
Events are read after the step's values have been copied to the host, when they have passed already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter, thread_time
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gptoughts.engine.engine import Engine
from gptoughts.engine.progress import BACKWARD, COMMUNICATION, END, OTHER, PARTS

HOST_SHARE = 0.9
"""A part in which the host launches for this share of its time on the device, with an empty queue before, is bound by the host."""

Stamp = Any  # seconds of the host's clock, or a CUDA event


@dataclass(frozen=True)
class Split:
    """Seconds of one step by part, on the device's timeline. They add up to the step."""

    seconds: dict[str, float]
    knows_communication: bool = True
    """Whether exchanges are timed. False if they run inside forward and backward, as with sharded weights."""
    host_bound: float | None = None
    """Share of the step in which the GPU waited for the host to launch; None on a CPU."""
    cpu_seconds: float | None = None
    """CPU time of the training thread, which leaves out waits and the time of other processes; None on a GPU."""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds.values())

    @property
    def busy(self) -> float | None:
        """Seconds in which this rank did not wait for others; None if exchanges are not timed."""
        return self.total - self.seconds[COMMUNICATION] if self.knows_communication else None

    def row(self) -> dict[str, float | None]:
        """Return the `time/` keys of metrics.jsonl."""
        known: dict[str, float | None] = {f"time/{part}": self.seconds[part] for part in PARTS}
        return known if self.knows_communication else {**known, f"time/{COMMUNICATION}": None}


NO_SPLIT: dict[str, float | None] = {f"time/{part}": None for part in PARTS}
"""The keys of a row whose step was not sampled."""


@dataclass
class Sample:
    """Timestamps of one step."""

    seconds_between: Callable[[Stamp, Stamp], float]
    knows_communication: bool
    marks: list[tuple[str, Stamp, float]] = field(default_factory=list)
    """Part that begins, timestamp on the device, seconds of the host: its clock with a GPU, else CPU time of this thread."""
    caught_up: list[bool] = field(default_factory=list)
    """For every mark but the first: whether the device had reached the mark before it when the host set this one."""
    gradients: list[Stamp] = field(default_factory=list)
    """When the last gradient of a parameter was complete, for the backward with exchanges."""

    @property
    def is_whole(self) -> bool:
        """Whether the step ended."""
        return bool(self.marks) and self.marks[-1][0] == END

    @property
    def has_passed(self) -> bool:
        """Whether the device has reached the end of the step, so that `split` does not wait."""
        return not self.caught_up or bool(self.marks[-1][1].query())

    def split(self) -> Split:
        """Return seconds by part. The device must have reached the last mark."""
        seconds = dict.fromkeys(PARTS, 0.0)
        host_bound = 0.0
        backwards = [index for index, (part, _, _) in enumerate(self.marks) if part == BACKWARD]
        for index, ((part, began, host_began), (_, ended, host_ended)) in enumerate(
            zip(self.marks, self.marks[1:], strict=False)
        ):
            length = self.seconds_between(began, ended)
            if self.gradients and index == backwards[-1]:
                # Between the last gradient and the end of the backward, ranks only exchange.
                exchanged = min(max(0.0, self.seconds_between(self.gradients[0], ended)), length)
                seconds[COMMUNICATION] += exchanged
                length -= exchanged
            seconds[part if part != COMMUNICATION or self.knows_communication else OTHER] += length
            if self.caught_up and self.caught_up[index] and host_ended - host_began >= HOST_SHARE * length:
                host_bound += length
        total = sum(seconds.values())
        on_gpu = bool(self.caught_up)
        bound = host_bound / total if on_gpu and total else None
        cpu = None if on_gpu else self.marks[-1][2] - self.marks[0][2]
        return Split(seconds, self.knows_communication, bound, cpu)


class StepTimer:
    """Samples steps of one engine: `start` before a step, `stop` after it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._on_gpu = engine.device.type == "cuda"
        self._sample: Sample | None = None
        self._undo: list[Any] = []
        self._before = engine.mark

    def start(self) -> None:
        """Time the next step; the marks of a step that is repeated count from its last beginning."""
        self.stop()
        engine = self._engine
        replicated = isinstance(engine.model, DistributedDataParallel)
        self._sample = Sample(_event_seconds if self._on_gpu else _clock_seconds, engine.ranks.size == 1 or replicated)
        engine.mark = self._mark
        if replicated:
            self._watch_gradients(engine.parameters())

    def stop(self) -> Sample | None:
        """End the sample and return it; None if there is none or its step did not end."""
        sample, self._sample = self._sample, None
        self._engine.mark = self._before
        for handle in self._undo:
            handle.remove()
        self._undo.clear()
        return sample if sample is not None and sample.is_whole else None

    def _mark(self, part: str) -> None:
        sample = self._sample
        assert sample is not None
        if sample.is_whole:  # the update was skipped, and this is the next step
            sample.marks.clear()
            sample.caught_up.clear()
            sample.gradients.clear()
        if part == COMMUNICATION and self._engine.ranks.size == 1:
            part = OTHER
        if self._on_gpu and sample.marks:
            sample.caught_up.append(sample.marks[-1][1].query())
        sample.marks.append((part, self._stamp(), perf_counter() if self._on_gpu else thread_time()))

    def _stamp(self) -> Stamp:
        if not self._on_gpu:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _watch_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Note the time after each gradient; the last one counts. DDP's own hooks run after these."""
        sample = self._sample
        assert sample is not None
        event = torch.cuda.Event(enable_timing=True) if self._on_gpu else None

        def note(parameter: nn.Parameter) -> None:
            if event is not None:
                event.record()
            sample.gradients[:] = [event if event is not None else perf_counter()]

        self._undo += [parameter.register_post_accumulate_grad_hook(note) for parameter in parameters]


def _clock_seconds(began: float, ended: float) -> float:
    return ended - began


def _event_seconds(began: Any, ended: Any) -> float:
    return float(began.elapsed_time(ended)) / 1000
