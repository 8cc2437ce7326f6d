"""Figures that are kept at once: whole files or none, nothing measured twice, and a clock that says when to stop."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LEAST_SECONDS = 15.0
"""Nothing is started with less than this: a process that opens the GPU takes most of it."""


class Deadline:
    """The seconds that a stage has left. Every measurement asks before it starts."""

    def __init__(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds from now, 0 when there are none."""
        return max(0.0, self._ends - time.monotonic())

    def allows(self, seconds: float) -> bool:
        """Whether something that takes about this long may still start."""
        return self.left() >= max(seconds, LEAST_SECONDS)


def folder() -> Path:
    """Where stages keep their files between calls; results go to $OUT as well."""
    path = Path(os.environ.get("DEVICE_WORK", "/tmp/gptoughts-device"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def write(path: Path, values: Any) -> None:
    """`values` as JSON, whole or not at all."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


@dataclass
class Kept:
    """One stage's file: `runs` by name, what failed and why by name, and the machine that it was measured on."""

    stage: str
    values: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.path = folder() / "kept" / f"{self.stage}.json"
        self.values = {"stage": self.stage, "machine": {}, "runs": {}, "failures": {}}
        if self.path.exists():
            self.values |= json.loads(self.path.read_text(encoding="utf-8"))

    @property
    def runs(self) -> dict[str, Any]:
        """What was measured, by name."""
        return dict(self.values["runs"])

    def holds(self, name: str) -> bool:
        """Whether `name` was measured by an earlier start, or earlier in this one."""
        return name in self.values["runs"]

    def keep(self, name: str, figures: dict[str, Any]) -> None:
        """Add a measurement; its failure, if there was one before, is forgotten."""
        self.values["runs"][name] = figures
        self.values["failures"].pop(name, None)
        self.values.get("refused", {}).pop(name, None)
        self.save()

    def keep_failure(self, name: str, why: str) -> None:
        """Note why a measurement gave nothing. It is tried again by the next start."""
        self.values["failures"][name] = why[-4000:]
        self.save()

    def on(self, machine: dict[str, Any]) -> None:
        """Note the machine. One of another kind, or with another torch, starts a new list, so that nothing is mixed."""
        before = self.values["machine"]
        same = all(before.get(key) == machine.get(key) for key in ("gpu", "torch", "python"))
        if before and not same:
            self.path.replace(self.path.with_name(f"{self.path.stem}.older-{int(time.time())}.json"))
            self.values |= {"runs": {}, "failures": {}}
        self.values["machine"] = machine
        self.save()

    def save(self) -> None:
        """Write to the folder that lasts, and beside the other results."""
        write(self.path, self.values)
        if "OUT" in os.environ:
            write(Path(os.environ["OUT"]) / self.path.name, self.values)
