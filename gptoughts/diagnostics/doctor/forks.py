"""Run jobs in child processes with deadlines; a crash or a hang is a result.

A server process imports torch once and forks a child per job, so that ten checks do not import it ten times. A crash of a job, even a
segmentation fault, does not reach the caller.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from gptoughts.console import print_line
from gptoughts.processes import POLL_SECONDS, ROOT, Child, exit_text, kill_group, last_lines

START_SECONDS = 90
"""Time for the server's import of torch, from a cold network disk."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


@dataclass(frozen=True)
class Job:
    """A call of `module.function(*arguments)`, which returns JSON values.

    Jobs with the same `together` start at the same time, as ranks must; those without run one per core. A set starts after the one
    before it has ended.
    """

    name: str
    module: str
    function: str
    arguments: tuple[Any, ...] = ()
    seconds: float = 60.0
    together: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """Result of a job: its figures, or None and the `last_line` of its output. `code` is None after a timeout."""

    name: str
    figures: dict[str, Any] | None
    code: int | None
    last_line: str
    seconds: float
    tried: bool = True
    """False if the server ended before the job started."""

    @property
    def trouble(self) -> str:
        """Return the problem in one line; empty if there was none."""
        if self.figures is not None:
            return str(self.figures.get("error", ""))
        end = f"timed out after {self.seconds:.0f} s" if self.code is None else exit_text(self.code)
        return f"{end}: {self.last_line}" if self.last_line else end


def run(jobs: Iterable[Job], at_once: int, watch: Callable[[], None] | None = None) -> dict[str, Outcome]:
    """Return every job's outcome by name. `watch` is called every 20 ms meanwhile. Never raises for an error of a job."""
    wanted = list(jobs)
    if not wanted:
        return {}
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name), time.monotonic()
        (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in wanted]), encoding="utf-8")
        server = Child(__name__, "serve", name, at_once, environment={**os.environ, **OFFLINE}, paths=[ROOT])
        try:
            code = server.wait(START_SECONDS + sum(job.seconds for job in wanted), watch)
        finally:  # also after Ctrl-C: the server ends its jobs, which lead process groups of their own
            server.close(5)
        outcomes = [Outcome(**json.loads(line)) for line in _text(folder / "outcomes").splitlines()]
    found, lost = {outcome.name: outcome for outcome in outcomes}, time.monotonic() - began
    return {job.name: found.get(job.name) or Outcome(job.name, None, code, server.output(), lost, False) for job in wanted}


def serve(requests: IO[bytes], answers: IO[bytes], name: str, at_once: int) -> None:
    """Run the jobs of folder `name` and append an outcome to its file `outcomes` as each one ends; stop when `requests` ends."""
    import multiprocessing

    # A fork after torch is not safe on macOS, where its libraries start threads.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    folder = Path(name)
    running: list[_Running] = []
    jobs = [Job(**job) for job in json.loads(_text(folder / "jobs.json"))]
    signal.alarm(START_SECONDS)  # its default action ends the server even if the import hangs in C code
    try:
        import torch  # noqa: F401
    except BaseException as error:  # reported by the job that imports torch
        print_line(f"torch: {type(error).__name__}: {error}", sys.stderr)
    signal.alarm(0)

    def reap() -> None:
        for one in [one for one in running if one.is_over()]:
            running.remove(one)
            with (folder / "outcomes").open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(one.outcome())) + "\n")

    def wait_while(busy: Callable[[], bool]) -> None:
        while busy():
            if select.select([requests], [], [], POLL_SECONDS)[0]:  # the parent closed the pipe or died
                sys.exit(1)
            reap()

    try:
        for number, job in enumerate(jobs):
            reap()
            wait_while(lambda job=job: not _room(running, job, at_once))  # type: ignore[misc]
            running.append(_Running(context, job, folder / str(number)))
        wait_while(lambda: bool(running))
    finally:
        for one in running:
            one.end()


def _room(running: list[_Running], job: Job, at_once: int) -> bool:
    """Return whether `job` can start now."""
    if any(one.job.together != job.together for one in running):
        return False
    return len(running) < at_once or bool(job.together)


class _Running:
    """A started job with its deadline."""

    def __init__(self, context: Any, job: Job, path: Path) -> None:
        self.job, self.path, self.timed_out, self.began = job, path, False, time.monotonic()
        self.process = context.Process(target=_child, args=(job, str(path)))
        self.process.start()

    def is_over(self) -> bool:
        """Return whether the job ended; kill it after its deadline."""
        if self.process.is_alive():
            if time.monotonic() - self.began < self.job.seconds:
                return False
            self.timed_out = True
            self.end()
        self.process.join()
        return True

    def end(self) -> None:
        """Kill the job and every process it started."""
        kill_group(self.process.pid)

    def outcome(self) -> Outcome:
        """Return the outcome of the ended job."""
        text = _text(self.path.with_suffix(".json"))
        code = None if self.timed_out else self.process.exitcode
        figures, line = json.loads(text) if text and code == 0 else None, last_lines(_text(self.path.with_suffix(".log")))
        return Outcome(self.job.name, figures, code, line, time.monotonic() - self.began)


def _child(job: Job, path: str) -> None:
    os.setsid()
    log = os.open(f"{path}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(log, number)
    os.environ.update(job.environment)
    figures = getattr(import_module(job.module), job.function)(*job.arguments)
    Path(f"{path}.json").write_text(json.dumps(figures), encoding="utf-8")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
