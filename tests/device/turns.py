"""Lets children take turns: every round asks each for some steps, in another order than the last, and times nothing itself."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import IO, Any

from tests.device.kept import Deadline, folder
from tests.device.serving import MARK


class Broken(Exception):
    """A child that did not answer, or answered with an error. Its text is what goes into the file."""

    def __init__(self, text: str, out_of_memory: bool = False, refused: bool = False) -> None:
        super().__init__(text)
        self.out_of_memory, self.refused = out_of_memory, refused


@dataclass(frozen=True)
class Job:
    """One child: a recipe with what is laid over it, and the module that trains it."""

    name: str
    recipe: str
    fields: dict[str, str]
    layers: dict[str, str] = field(default_factory=dict)
    module: str = "tests.device.ours"
    more: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def words(self) -> dict[str, Any]:
        """What the child is told."""
        return {"name": self.name, "recipe": self.recipe, "fields": self.fields, "layers": self.layers, **self.more}

    def command(self) -> str:
        """The plan as the command line would ask for it."""
        return " ".join(["gptoughts", "train", self.recipe, *flags(self.fields, self.layers)])


def flags(fields: dict[str, str], layers: dict[str, str]) -> list[str]:
    """Fields and layers as the command line takes them."""
    pairs = [(f"--{key}", value) for key, value in fields.items()]
    pairs += [(f"--layer.{slot}", value) for slot, value in layers.items()]
    return [word for pair in pairs for word in pair]


def environment_of(job: Job, deadline: Deadline) -> dict[str, str]:
    """The variables that the job's plan wants; they count only before the child starts. Broken with the plan's own words."""
    if job.module != "tests.device.ours":
        return {}
    command = [sys.executable, "-m", "gptoughts", "plan", job.recipe, "--json", *flags(job.fields, job.layers)]
    known = {**os.environ, **job.environment}
    done = subprocess.run(command, capture_output=True, text=True, env=known, check=False, timeout=max(deadline.left(), 1))
    if done.returncode:
        told = done.stderr.strip()[-2000:]
        raise Broken(f"no plan: {told}", refused=told.startswith("PlanError"))
    return dict(json.loads(done.stdout)["environment"])


class Child:
    """A process of one job, its answers read by a thread so that waiting for them can end."""

    def __init__(self, job: Job, deadline: Deadline) -> None:
        self.job, self._deadline = job, deadline
        self.seconds: list[float] = []
        self.steps: list[int] = []
        self.clocks: list[Any] = []
        self._log = folder() / "logs" / f"{job.name.replace('/', '-')}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        variables = {**os.environ, **environment_of(job, deadline), **job.environment, "HF_HUB_OFFLINE": "1"}
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._began = time.monotonic()
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", job.module, json.dumps(job.words())],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=variables,
            )  # fmt: skip
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        self.ready: dict[str, Any] = {}
        self.start_seconds = 0.0

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            if line.startswith(MARK):
                self._answers.put(line.removeprefix(MARK))
        self._answers.put(None)

    def wait_until_ready(self) -> None:
        """Until it is built, warm and watched."""
        self.ready = self._answer("ready")
        self.start_seconds = round(time.monotonic() - self._began, 1)

    def turn(self, steps: int) -> None:
        """So many steps, now."""
        self._tell(steps)
        done = self._answer("done")
        self.seconds.append(done["seconds"])
        self.steps.append(done["steps"])
        self.clocks.append(done.get("clocks"))

    def end(self) -> dict[str, Any]:
        """Ask for the last figures and let it go."""
        self._tell(0)
        return self._answer("ended")

    def close(self) -> None:
        """Let the process end, or end it."""
        if self._process.poll() is None:
            try:
                self._process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End it at once."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _tell(self, steps: int) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Broken(f"{self.job.name}: ended early\n{self._tail()}") from None

    def _answer(self, kind: str) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=max(self._deadline.left(), 0.1))
        except queue.Empty:
            raise Broken(f"{self.job.name}: no answer before the stage's time was over\n{self._tail()}") from None
        if line is None:
            code = self._process.wait()
            raise Broken(f"{self.job.name}: ended with code {code} before it was {kind}\n{self._tail()}")
        values = json.loads(line)
        if "failed" in values:
            raise Broken("\n".join([values["failed"], *values["where"]]), values["out_of_memory"])
        return dict(values[kind])

    def _tail(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-2500:]

    def figures(self, ended: dict[str, Any]) -> dict[str, Any]:
        """Speed with its spread, MFU, and everything that the child told."""
        speeds = [
            steps * self.ready["tokens_per_step"] / seconds for steps, seconds in zip(self.steps, self.seconds, strict=True)
        ]
        middle, mfu = median(speeds), ended.pop("mfu_of_one_token_per_second", None)
        return {
            "command": self.job.command(), "layers_asked": self.job.layers, "more": self.job.more,
            "tokens_per_second": round(middle, 1), "spread": _spread(speeds), "rounds": speeds, "steps_per_round": self.steps[0],
            "mfu": None if mfu is None else mfu * middle, "start_seconds": self.start_seconds,
            "clocks_after_each_round": self.clocks, **self.ready, **ended,
        }  # fmt: skip


def _spread(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {"min": values[0], "max": values[0], "q1": values[0], "q3": values[0]}
    lower, _, upper = quantiles(values, n=4, method="inclusive")
    return {"min": min(values), "max": max(values), "q1": lower, "q3": upper}


def take_turns(jobs: list[Job], rounds: int, steps: int, deadline: Deadline) -> dict[str, dict[str, Any]]:
    """Figures of every job by name, all alive at once. Raises Broken for the first that fails; all are ended then."""
    children: list[Child] = []
    whole = False
    try:
        for job in jobs:  # one after another: two compilations at once would only slow each other
            children.append(Child(job, deadline))
            children[-1].wait_until_ready()
        for number in range(rounds):
            first = number % len(children)
            for child in children[first:] + children[:first]:
                child.turn(steps)
        figures = {child.job.name: child.figures(child.end()) for child in children}
        whole = True
        return figures
    finally:
        for child in children:
            child.close() if whole else child.kill()


def parity_of(one: list[float], other: list[float], last: int = 20) -> dict[str, float] | None:
    """Means of the last losses and their difference; None where there are too few to say anything."""
    count = min(len(one), len(other))
    if count < 2 * last:
        return None
    first, second = (sum(values[count - last : count]) / last for values in (one, other))
    return {"updates": count, "mean_of_last": last, "one": first, "two": second, "relative": (second - first) / first}
