"""Goodput: wall time of a run by what it was spent on, over all its attempts, kept in out/RUN/goodput.json.

The phases that the loop reports to the failure watch are the boundaries. The file is replaced atomically at most once a second and at every
checkpoint, so a killed attempt loses less than a second or one step to `restart`. Cost: two clock reads per step, and the file.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gptoughts.console import LOGGER, duration, share
from gptoughts.engine.callback import Callback
from gptoughts.engine.engine import Engine
from gptoughts.engine.progress import Progress, StepStats
from gptoughts.files import load_json, write_json

FILE = "goodput.json"
PARTS = ("start", "compile", "productive", "data", "evaluation", "checkpoint", "sample", "restart", "redone", "other")
"""start: process start to the first step. compile: time of the first steps (warm-up, compilation, watched step) beyond that of as many
later ones. productive: steps. data: waits for a batch. restart: between the end of an attempt and the start of the next. redone: steps of
an earlier attempt after the checkpoint that the next one resumed from. other: logging, callbacks, the end of the run."""
PHASES = {"step": "productive", "evaluation": "evaluation", "save": "checkpoint", "sample": "sample"}
"""Phase of `Engine.report` -> part; other phases are `other`."""
REDONE = ("productive", "data")
SECONDS_BETWEEN_WRITES = 1.0
MOST_CHECKPOINTS = 50
"""Newest checkpoints whose time is kept to count redone steps."""


class Ledger:
    """Seconds of this process by part. `switch` ends a phase and begins the next; steps are counted by their beginnings."""

    def __init__(self, since: float, warm_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with `since` seconds spent in `start`. The first `warm_steps` steps are where compilation is looked for."""
        self._clock, self._warm_steps = clock, warm_steps
        self._spent = dict.fromkeys(PARTS, 0.0) | {"start": max(0.0, since)}
        self._steps = [0, 0]  # warm-up, later
        self._step_seconds = [0.0, 0.0]
        self._phase, self._since = "start", clock()

    def switch(self, phase: str) -> None:
        """End the present phase and begin `phase`."""
        self._add()
        if phase == "step":
            self._steps[self._is_steady()] += 1
        self._phase = phase

    def _is_steady(self) -> bool:
        return self._steps[0] >= self._warm_steps

    def _add(self) -> None:
        now = self._clock()
        elapsed, self._since = now - self._since, now
        if self._phase == "step":
            self._step_seconds[self._steps[1] > 0] += elapsed
        elif self._phase == "start":
            self._spent["start"] += elapsed
        else:
            self._spent[PHASES.get(self._phase, "other")] += elapsed

    def parts(self, data_wait: float) -> dict[str, float]:
        """Return seconds by part until now; their sum is the time since the process started. `data_wait` was spent inside steps."""
        self._add()
        warm, later = self._step_seconds
        steady = later / self._steps[1] if self._steps[1] else math.inf
        compiling = max(0.0, warm - self._steps[0] * steady) if self._steps[1] else warm
        data = min(max(0.0, data_wait), warm + later - compiling)
        return {**self._spent, "compile": compiling, "data": data, "productive": warm + later - compiling - data}


class Goodput(Callback):
    """Keeps goodput.json of one attempt. Only the first rank has one."""

    phase = "log"
    on_stop = True

    def __init__(self, out: Path, attempt: int, began: float, resumed_from: int, warm_steps: int) -> None:
        """Read what earlier attempts spent. `began` is the unix time at which this process started."""
        self._file = out / FILE
        self._before, self._attempts, self._checkpoints = _read(self._file)
        if self._attempts:
            last = self._attempts[-1]
            if last["end"] == "running":
                last["end"] = "killed"
            if last["end"] != "finished":
                self._before["restart"] += max(0.0, began - last["ended"])
                _redo(self._before, self._checkpoints, resumed_from)
        self._attempts.append({"attempt": attempt, "began": began, "first_step": resumed_from})
        self._began, self._data_before = began, 0.0
        self._ledger = Ledger(time.time() - began, warm_steps)
        self._engine: Engine | None = None
        self._step, self._written, self._warned = resumed_from, -math.inf, False

    def on_start(self, engine: Engine, progress: Progress) -> None:
        """Listen to the phases of the loop."""
        watch = engine.report

        def report(phase: str) -> None:
            watch(phase)
            self._ledger.switch(phase)

        engine.report = report
        self._engine, self._data_before = engine, engine.counters.data_wait_seconds
        self.write("running")

    def due(self, step: int, last: bool) -> bool:
        """Due where the file is a second old, and at the last step."""
        return last or time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES

    def on_step(self, engine: Engine, progress: Progress, stats: StepStats, last: bool) -> None:
        """Write the file."""
        self._step = progress.step
        self.write("running")

    def checkpoint(self, step: int) -> None:
        """Note what was spent when the state of `step` was taken for a checkpoint."""
        now = self.parts()
        self._checkpoints[str(step)] = {part: now[part] for part in REDONE}
        for old in sorted(self._checkpoints, key=int)[:-MOST_CHECKPOINTS]:
            del self._checkpoints[old]
        self._step = step
        self.write("running")

    def attempt_parts(self) -> dict[str, float]:
        """Return seconds of this attempt by part."""
        wait = self._engine.counters.data_wait_seconds - self._data_before if self._engine else 0.0
        return self._ledger.parts(wait)

    def parts(self) -> dict[str, float]:
        """Return seconds of all attempts by part."""
        mine = self.attempt_parts()
        return {part: self._before[part] + mine[part] for part in PARTS}

    def write(self, end: str) -> None:
        """Replace the file. `end` is running, finished, interrupted, rewound or failed; an attempt that stays `running` was killed."""
        parts = self.parts()
        mine = {**self._attempts[-1], "ended": time.time(), "last_step": self._step, "end": end}
        self._attempts[-1] = mine
        self._written = time.monotonic()
        wall = sum(parts.values())
        content = {"wall_seconds": wall, "parts": parts, "attempts": self._attempts, "checkpoints": self._checkpoints}
        try:
            write_json(self._file, content)
        except OSError as error:
            if not self._warned:
                LOGGER.warning("%s: cannot write it (%s); training goes on", self._file, error.strerror)
            self._warned = True

    def close(self, end: str) -> str:
        """Write the final state. Returns the line for the console."""
        self._ledger.switch("end")
        self.write(end)
        return line(self.parts(), len(self._attempts))

    def waiting_for_disk(self) -> None:
        """Count the time from now on as `checkpoint`: the run waits until the last one is on disk."""
        self._ledger.switch("save")


def line(parts: Mapping[str, float], attempts: int = 1) -> str:
    """Return `goodput     81.2 % productive of 3 min 20 s: start 9.1 %, ...`, without parts below 0.05 %."""
    wall = sum(parts.values())
    if wall <= 0:
        return "goodput     n/a"
    others = sorted((part for part in PARTS if part != "productive"), key=lambda part: -parts[part])
    named = ", ".join(f"{part} {share(parts[part] / wall)}" for part in others if parts[part] / wall >= 0.0005)
    over = f" in {attempts} attempts" if attempts > 1 else ""
    return f"goodput     {share(parts['productive'] / wall)} productive of {duration(wall)}{over}: {named}"


def _redo(parts: dict[str, float], checkpoints: dict[str, dict[str, float]], resumed_from: int) -> None:
    """Move time after the checkpoint of `resumed_from` to `redone`; from step 0 that is all. Nothing if that checkpoint is not known."""
    kept = checkpoints.get(str(resumed_from), dict.fromkeys(REDONE, 0.0) if resumed_from == 0 else None)
    for step in [step for step in checkpoints if int(step) > resumed_from]:
        del checkpoints[step]
    if kept is None:
        return
    for part in REDONE:
        later = max(0.0, parts[part] - kept[part])
        parts[part] -= later
        parts["redone"] += later


def _read(file: Path) -> tuple[dict[str, float], list[dict[str, Any]], dict[str, dict[str, float]]]:
    """Return parts, attempts and checkpoints of earlier attempts; empty ones for a file that is missing or damaged."""
    try:
        content = load_json(file)
        parts = {part: float(content["parts"][part]) for part in PARTS}
        attempts = [dict(one, ended=float(one["ended"]), end=str(one["end"])) for one in content["attempts"]]
        checkpoints = {
            str(int(step)): {part: float(kept[part]) for part in REDONE} for step, kept in content["checkpoints"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return dict.fromkeys(PARTS, 0.0), [], {}
    return parts, attempts, checkpoints
