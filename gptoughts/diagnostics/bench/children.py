"""Variants in processes of their own, taking turns: started one after another, then each told to run some steps, in another order each round.

A shared machine drifts by more than the differences that are looked for, so a round holds every variant once, and only ratios within a
round are compared. Where all of them do not fit into memory together, each round starts every variant anew.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from gptoughts import errors
from gptoughts.diagnostics.bench.variant import OUT_OF_MEMORY, Job

Say = Callable[[str], None]

ROOM = 2.0
"""Free memory that the next process must find, as a multiple of the most that one has taken so far: others need some, too, and a system
that runs out kills whom it likes."""
GRACE_SECONDS = 20
ROOT = Path(__file__).resolve().parents[3]
PROGRAM = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from gptoughts.diagnostics.bench.variant import main; main()"
USERS_MISTAKES = ("ConfigError", "DataError", "CheckpointError", "PlanError", "RunError")


class Turns(StrEnum):
    """How processes share the machine."""

    TOGETHER = "all alive, taking turns"
    APART = "one at a time, started again each round"
    IN_A_ROW = "one after the other, each from its first step to its last"


class ChildFailed(Exception):
    """A variant that could not go on: what kind of error, and its words."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}" if message else kind)
        self.kind, self.message = kind, message


class NoRoom(Exception):
    """The variants do not fit into memory together."""


@dataclass
class Told:
    """What one variant told: how it started, seconds per step of every round, the loss of every step, its most memory."""

    ready: dict[str, Any] = field(default_factory=dict)
    start_seconds: float | None = None
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    clock_mhz: list[int] = field(default_factory=list)
    failure: str = ""
    """Why it is not counted; empty where it is."""
    diverged: bool = False
    """Whether that is because its loss was no number any more."""

    @property
    def counted(self) -> bool:
        """Whether its figures mean what its name says."""
        return not self.failure and bool(self.seconds)


class Child:
    """One process. It leads a group of its own, so that what it started can be ended with it."""

    def __init__(self, job: Job, log: Path) -> None:
        self._log = log
        with log.open("w", encoding="utf-8") as errors_of:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM], env=environment_of(job), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=errors_of, text=True, encoding="utf-8", start_new_session=True,
            )  # fmt: skip
        self._job = job

    def start(self) -> dict[str, Any]:
        """Hand over the job; what the variant tells when it is warm and was watched. Raises ChildFailed."""
        found: dict[str, Any] = self._asked(self._job.to_json())["ready"]
        return found

    def run(self, steps: int) -> dict[str, Any]:
        """So many more steps: seconds, losses, most memory. Raises ChildFailed."""
        found: dict[str, Any] = self._asked({"steps": steps})["ran"]
        return found

    def _asked(self, message: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has gone; its last words, read now, say why
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise ChildFailed(*self._how_it_died())
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise ChildFailed(answer["failed"]["kind"], answer["failed"]["message"])
        return answer

    def _how_it_died(self) -> tuple[str, str]:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return OUT_OF_MEMORY, "the process was killed, as systems do when memory runs out"
        tail = [line for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()][-3:]
        return f"left with {code}", " / ".join(tail)

    def close(self) -> None:
        """Let it end by itself: its input closes, and it undoes its layers. What still lives after a while is killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has gone already
            self._process.stdin.close()
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process.stdout.close()

    def kill(self) -> None:
        """End it and what it started, now."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def environment_of(job: Job) -> dict[str, str]:
    """The variables of a variant's process: ours, less what gptoughts itself had set here for another plan, with those of its plan."""
    from gptoughts.planning.environment import GUARD

    ours = os.environ.get(GUARD, "").partition(":")[2].split(",")
    return {**{name: value for name, value in os.environ.items() if name not in (GUARD, *ours)}, **job.environment}


@contextmanager
def _processes() -> Iterator[dict[str, Child]]:
    """A table for children: on leaving they are closed, after an error or Ctrl-C killed."""
    children: dict[str, Child] = {}
    try:
        yield children
    except BaseException:
        for child in children.values():
            child.kill()
        raise
    finally:
        for child in children.values():
            child.close()


def measure(
    jobs: Mapping[str, Job], rounds: int, steps: int, say: Say, turns: Turns | None = None, otherwise: Turns = Turns.APART
) -> tuple[dict[str, Told], Turns]:
    """Run every job `rounds` times `steps` steps. `turns` None takes them together where they fit, and `otherwise` where not.

    Raises the user's own mistake (a missing text, sizes that do not fit) where the first variant meets it; what later ones meet is
    their own, and stands in their `failure`.
    """
    with TemporaryDirectory(prefix="gptoughts-bench-") as folder:
        if turns in (None, Turns.TOGETHER):
            try:
                return _together(jobs, rounds, steps, say, Path(folder), turns is Turns.TOGETHER), Turns.TOGETHER
            except NoRoom as error:
                say(f"{error}: {otherwise}")
                turns = otherwise
        assert turns is not None
        if turns is Turns.APART:
            return _apart(jobs, rounds, steps, say, Path(folder)), turns
        told: dict[str, Told] = {}
        for name, job in jobs.items():
            told |= _together({name: job}, rounds, steps, lambda text, name=name: say(f"{name}, {text}"), Path(folder), True)  # type: ignore[misc]
        return told, turns


def order(names: list[str], number: int) -> list[str]:
    """The order of a round: rotated by its number, every other round backwards."""
    first = number % len(names) if names else 0
    turned = names[first:] + names[:first]
    return turned if number % 2 == 0 else turned[::-1]


def _together(jobs: Mapping[str, Job], rounds: int, steps: int, say: Say, folder: Path, forced: bool) -> dict[str, Told]:
    told = {name: Told() for name in jobs}
    with _processes() as children:
        for number, (name, job) in enumerate(jobs.items()):
            if not forced and not _roomy(told.values()):
                raise NoRoom(f"no room for {len(jobs)} processes at once after {number}")
            say(f"starting {number + 1} of {len(jobs)}: {name}")
            children[name] = Child(job, folder / f"{number}.log")
            _start(children[name], told[name], not any(one.ready for one in told.values()))
            _refuse_crowding(name, told[name], len(children), forced)
            if told[name].failure:
                say(f"  {name} is not counted: {told[name].failure}")
                children.pop(name).close()
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for name in order(list(children), number):
                _run(children[name], told[name], steps)
                _refuse_crowding(name, told[name], len(children), forced)
                if told[name].failure:
                    say(f"  {name} is not counted: {told[name].failure}")
                    children.pop(name).close()
    return told


def _refuse_crowding(name: str, told: Told, alive: int, forced: bool) -> None:
    """Raises NoRoom where a variant ran out of memory beside others: alone it may fit."""
    if told.failure.startswith(OUT_OF_MEMORY) and alive > 1 and not forced:
        raise NoRoom(f"{name} ran out of memory beside {alive - 1} others")


def _apart(jobs: Mapping[str, Job], rounds: int, steps: int, say: Say, folder: Path) -> dict[str, Told]:
    told = {name: Told() for name in jobs}
    for number in range(rounds):
        alive = [name for name in jobs if not told[name].failure]
        for place, name in enumerate(order(alive, number)):
            say(f"round {number + 1} of {rounds}, {place + 1} of {len(alive)}: {name}")
            with _processes() as children:
                children[name] = Child(jobs[name], folder / "one.log")
                told[name].losses = []  # each start trains the same steps
                _start(children[name], told[name], not any(one.ready for one in told.values()))
                if not told[name].failure:
                    _run(children[name], told[name], steps)
            if told[name].failure:
                say(f"  {name} is not counted: {told[name].failure}")
    return told


def _roomy(told: Iterable[Told]) -> bool:
    """Whether one more process would fit, as far as those before it tell."""
    ready = [one.ready for one in told if one.ready]
    held = [one["held_bytes"] for one in ready if one["held_bytes"] is not None]
    free = ready[-1]["free_bytes"] if ready else None
    return free is None or not held or free >= ROOM * max(held)


def _start(child: Child, told: Told, first: bool) -> None:
    began = perf_counter()
    try:
        told.ready = child.start()
    except ChildFailed as error:
        if first and error.kind in USERS_MISTAKES:
            raise getattr(errors, error.kind)(error.message) from None
        told.failure = str(error)
        return
    if told.start_seconds is None:
        told.start_seconds = perf_counter() - began
    _add_losses(told, told.ready["losses"])
    told.peak_bytes = told.peak_bytes or told.ready["peak_bytes"]
    idle = [line for line in told.ready["evidence"] if line["status"] == "inactive"]
    if idle:
        told.diverged = False  # what was not active says nothing of the layer
        told.failure = "inactive: " + "; ".join(f"{line['slot']}={line['layer']}: {line['proof']}" for line in idle)


def _run(child: Child, told: Told, steps: int) -> None:
    try:
        ran = child.run(steps)
    except ChildFailed as error:
        told.failure = str(error)
        return
    told.seconds.append(ran["seconds"] / ran["steps"])
    _add_losses(told, ran["losses"])
    if ran["peak_bytes"] is not None:
        told.peak_bytes = ran["peak_bytes"]
    told.clock_mhz += [ran["clock_mhz"]] if ran["clock_mhz"] else []


def _add_losses(told: Told, losses: list[float]) -> None:
    """Keep the losses; a training that has come to nothing is not counted, however fast it is."""
    told.losses += losses
    wrong = next((step for step, loss in enumerate(told.losses, 1) if not math.isfinite(loss)), None)
    if wrong is not None and not told.failure:
        told.failure, told.diverged = f"its loss is not finite from step {wrong} on", True
