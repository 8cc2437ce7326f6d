"""Jobs in processes of their own, each with a deadline; what crashes or hangs there is a result here.

A server process imports torch once and forks a child per job, so that ten checks do not import it ten times. Nothing that a job does,
a segmentation fault included, reaches the process that asked.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
MARK = "@gptoughts "
# What the server takes besides its jobs: a first import of torch from a cold network disk.
START_SECONDS = 90
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Job:
    """A call of `module.function(*arguments)`, which returns plain JSON.

    Jobs with the same word in `together` start at the same time, as ranks must; those without run as many at once as there are cores.
    One set begins when the one before it has ended.
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
    """How a job ended: its figures, or None and why in `said`. `code` is None where it ran past its deadline."""

    name: str
    figures: dict[str, Any] | None
    code: int | None
    said: str
    seconds: float
    tried: bool = True
    """False where the server ended before its turn came."""

    @property
    def trouble(self) -> str:
        """What went wrong in one line; empty where nothing did."""
        if self.figures is not None:
            return str(self.figures.get("error", ""))
        tail = f": {self.said}" if self.said else ""
        if self.code is None:
            return f"did not come back in {self.seconds:.0f} s and was ended{tail}"
        if self.code < 0:
            return f"was killed by {_signal_name(-self.code)}{tail}"
        return f"left with exit code {self.code}{tail}"


def run(jobs: Iterable[Job], at_once: int, watch: Callable[[], None] | None = None) -> dict[str, Outcome]:
    """Every job's outcome by its name. `watch` is called again and again meanwhile. Never raises for what a job does."""
    wanted = list(jobs)
    if not wanted:
        return {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in wanted]), encoding="utf-8")
        began = time.monotonic()
        code, said = _serve(folder, at_once, START_SECONDS + sum(job.seconds for job in wanted), watch)
        found = {}
        for line in _text(folder / "out").splitlines():
            if line.startswith(MARK):
                outcome = Outcome(**json.loads(line.removeprefix(MARK)))
                found[outcome.name] = outcome
    lost = time.monotonic() - began
    return {job.name: found.get(job.name) or Outcome(job.name, None, code, said, lost, tried=False) for job in wanted}


def _serve(folder: Path, at_once: int, seconds: float, watch: Callable[[], None] | None) -> tuple[int | None, str]:
    """Run the server to its end. Its exit code, None where it was ended, and its last words."""
    # -P: a torch.py in the user's folder must not be taken for torch.
    child = f"from gptoughts.diagnostics.doctor.forks import serve; serve({str(folder)!r}, {at_once})"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # Nothing here asks the network.
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "PYTHONPATH": path}
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", child],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, **offline},
            start_new_session=True,
        )
        deadline = time.monotonic() + seconds
        try:
            while process.poll() is None and time.monotonic() < deadline:
                if watch is not None:
                    watch()
                time.sleep(POLL_SECONDS)
        finally:  # also where the user interrupts
            ended = process.poll() is None
            if ended:
                # SIGTERM first: the server ends its own children, which are sessions of their own.
                process.terminate()
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    return (None if ended else process.returncode), last_words(_text(folder / "err"))


def serve(name: str, at_once: int) -> None:
    """The server: import torch, then run the jobs of the folder `name` and print an outcome as each one ends."""
    import multiprocessing

    # A fork after torch is not safe on macOS, where its libraries start threads.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    folder = Path(name)
    jobs = [Job(**job) for job in json.loads(_text(folder / "jobs.json"))]
    signal.alarm(START_SECONDS)  # its default action ends the server, where an import hangs in C too
    try:
        import torch  # noqa: F401
    except BaseException as error:  # the job that imports torch tells; the others tell what they met
        print(f"torch: {type(error).__name__}: {error}", file=sys.stderr)
    signal.alarm(0)
    running: list[_Running] = []

    def leave(*_: Any) -> None:
        for one in running:
            one.end()
        sys.exit(1)

    signal.signal(signal.SIGTERM, leave)
    for number, job in enumerate(jobs):
        while not _room(running, job, at_once):
            time.sleep(POLL_SECONDS)
        running.append(_Running(context, job, folder / str(number)))
    while running:
        _reap(running)
        time.sleep(POLL_SECONDS)


def _room(running: list[_Running], job: Job, at_once: int) -> bool:
    """Whether `job` may start now."""
    _reap(running)
    if any(one.job.together != job.together for one in running):
        return False
    return len(running) < at_once or bool(job.together)


def _reap(running: list[_Running]) -> None:
    for one in [one for one in running if one.is_over()]:
        running.remove(one)
        print(MARK + json.dumps(asdict(one.outcome())), flush=True)


class _Running:
    """A job in its process, with its deadline."""

    def __init__(self, context: Any, job: Job, path: Path) -> None:
        self.job, self.path, self.timed_out, self.began = job, path, False, time.monotonic()
        self.process = context.Process(target=_child, args=(job, str(path)))
        self.process.start()

    def is_over(self) -> bool:
        """Whether it has ended; ends it where its time is up."""
        if self.process.is_alive():
            if time.monotonic() - self.began < self.job.seconds:
                return False
            self.timed_out = True
            self.end()
        self.process.join()
        return True

    def end(self) -> None:
        """Kill it and what it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # it has no session of its own yet
            self.process.kill()

    def outcome(self) -> Outcome:
        """What it left behind."""
        text = _text(self.path.with_suffix(".json"))
        code = None if self.timed_out else self.process.exitcode
        said = last_words(_text(self.path.with_suffix(".log")))
        return Outcome(
            self.job.name, json.loads(text) if text and code == 0 else None, code, said, time.monotonic() - self.began
        )


def _child(job: Job, path: str) -> None:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = os.open(f"{path}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(log, number)
    os.environ.update(job.environment)
    figures = getattr(import_module(job.module), job.function)(*job.arguments)
    Path(f"{path}.json").write_text(json.dumps(figures), encoding="utf-8")


def last_words(text: str) -> str:
    """The last line that is not empty, cut to 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
