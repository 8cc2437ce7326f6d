"""Failure watch: every rank publishes its progress, and all exit with one message if a rank is lost or none makes progress.

A daemon thread publishes a heartbeat every second on its own connection to the process group's store. Rank 0 reads all of them, the others
only rank 0's, so the store serves about three small requests per rank and second. A second thread keeps the clock, and ends the process where
the store itself does not answer. Neither needs the main thread, which may be stuck in a collective.

`GPTOUGHTS_STALL_SECONDS` (default 180; 0 turns the watch off) is the limit of a training step; slow steps raise it to five times the slowest
recent one. Start, the first steps, which compile, and everything between steps get ten times as long.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import tempfile
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from gptoughts.console import redacted, shown
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.distributed.verdict import DISCONNECTED, DONE, FAILED, SILENT_SECONDS, RankState, Seen, Verdict, decide
from gptoughts.errors import ConfigError, RunError
from gptoughts.hardware.world import World
from gptoughts.models.torch_internals import default_store

EXIT_CODE = 76
"""Exit code of every rank that the watch ends. 75 is out of memory."""
VARIABLE = "GPTOUGHTS_STALL_SECONDS"
STALL_SECONDS = 180.0
LONG = 10
"""Limit of phases other than a step, in limits of a step."""
FIRST_STEPS = 3
"""Steps that may compile, and have the longer limit."""
BEAT_SECONDS = 1.0
END_SECONDS = 20.0
"""Longest time from the verdict to the exit."""
LOST_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "Connection refused")


def stall_seconds(environment: Any = os.environ) -> float:
    """Return the limit of a step in seconds, 0 for no watch. Raises ConfigError for a value that is not a number."""
    text = environment.get(VARIABLE, "")
    try:
        seconds = float(text) if text.strip() else STALL_SECONDS
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise ConfigError(f"{VARIABLE}: must be a number of seconds, 0 to turn the watch off", found=repr(text))
    return seconds


def is_lost_connection(error: BaseException | None) -> bool:
    """Return whether a collective failed because a peer is gone. NCCL has exception types for it, gloo only messages."""
    while error is not None:
        if isinstance(error, dist.DistError):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_WORDS):
            return True
        error = error.__cause__
    return False


class Pace:
    """Progress of this rank: `report` costs well below a microsecond and is called by the training thread.

    Time is the clock that `advance` moves. It leaves out the time in which the whole process was stopped, as by a suspended job.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.reports = 0
        self.phase = "start"
        self._since = 0.0
        self._steps = 0
        self._slowest = 0.0

    def report(self, phase: str) -> None:
        """Note that `phase` begins, or that it made progress."""
        if self._since != self.now:  # seldom: the clock moves twice a second
            now = self.now
            if self.phase == "step" and self._steps > FIRST_STEPS:
                self._slowest = max(now - self._since, 0.9 * self._slowest)
            self._since = now
        if phase == "step":
            self._steps += 1
        self.phase = phase
        self.reports += 1

    def advance(self, seconds: float) -> None:
        """Move the clock by `seconds`, of which at most three beats count."""
        self.now += min(seconds, 3 * BEAT_SECONDS)

    @property
    def age(self) -> float:
        """Seconds since the last report."""
        return self.now - self._since

    @property
    def limit(self) -> float:
        """Seconds that the present phase may last without a report."""
        if self.phase == "step" and self._steps > FIRST_STEPS:
            return max(self.seconds, 5 * self._slowest)
        return LONG * self.seconds


class FailureWatch:
    """Watches over all ranks between `start` and the end of its block. One process is not watched."""

    def __init__(self, world: World, folder: Path | None = None) -> None:
        self._world, self._folder = world, folder
        seconds = stall_seconds()
        self.active = world.world_size > 1 and seconds > 0
        self._pace = Pace(seconds)
        self.report = self._pace.report
        """Note progress: a phase name. `step` has the short limit."""
        self._silence = min(SILENT_SECONDS, seconds)
        self._store: Any = None
        self._seen: dict[int, tuple[RankState, float]] = {}
        """The newest state of each rank, and when this rank first saw it."""
        self._complete = False
        self._beats = 0
        self._exchanged = 0.0
        self._stopping = threading.Event()
        self._ending = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self, ranks: Ranks) -> None:
        """Begin to watch. Call it on every rank after the process group was opened."""
        if not self.active:
            return
        # The store outlives sessions and restarts of torchrun, so each watch has a name of its own, which rank 0 draws.
        name = ranks.largest(float(int.from_bytes(os.urandom(6), "big")) if ranks.first else 0.0)
        store = default_store().clone()
        store.set_timeout(timedelta(seconds=self._silence))
        self._store = dist.PrefixStore(f"watch/{name:.0f}", store)
        self._store.set(str(self._world.rank), self._state().to_text())
        if self._world.rank == 0:
            self._store.set("verdict", "")
        for target in (self._beat, self._keep_time):
            self._threads.append(threading.Thread(target=target, name="failure-watch", daemon=True))
            self._threads[-1].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._threads:
            return
        self.end_if_lost(error)
        self._pace.phase = DONE if error is None else FAILED
        self._stopping.set()
        self._threads[0].join(3 * BEAT_SECONDS)  # its last heartbeat says that this rank ended

    def end_if_lost(self, error: BaseException | None) -> None:
        """After a collective that failed because a peer is gone, end the process with one message on one rank.

        Raises RunError where the watch is off or could not find out which rank it is.
        """
        if not is_lost_connection(error):
            return
        if self._threads:
            self._pace.report(DISCONNECTED)
            self._stopping.wait(END_SECONDS)  # the watch ends the process
            self._stopping.set()
        raise RunError(
            f"rank {self._world.rank}: lost the connection to another rank, whose message names the cause",
            found=str(error).splitlines()[0][:200],
        ) from error

    def _state(self) -> RankState:
        pace = self._pace
        return RankState(pace.phase, pace.reports, pace.age, pace.limit, self._beats, _host(), os.getpid())

    # The two threads.

    def _beat(self) -> None:
        last = False
        while not last:
            last = self._stopping.wait(BEAT_SECONDS)
            try:
                found = self._exchange()
            except RuntimeError:  # a store that stays away is a case for the other thread
                continue
            if found is not None and not last:
                self._end(found)

    def _keep_time(self) -> None:
        before = time.monotonic()
        while not self._stopping.wait(BEAT_SECONDS / 2):
            now = time.monotonic()
            self._pace.advance(now - before)
            before = now
            away, waits = self._pace.now - self._exchanged, self._pace.age
            finished = 0 in self._seen and self._seen[0][0].phase == DONE
            if min(away, waits) >= self._silence + 2 * BEAT_SECONDS and not finished:
                text = (
                    f"error: rank {self._world.rank}: the store of the process group has not answered for {away:.0f} s. "
                    "Rank 0, or the launcher that holds the store, is stopped or gone."
                )
                self._end(Verdict(text, True, author=self._world.rank), reachable=False)

    def _exchange(self) -> Verdict | None:
        """Publish this rank's state, read what concerns it, and return the verdict if there is one."""
        rank, store, now = self._world.rank, self._store, self._pace.now
        self._beats += 1
        state = self._state()
        store.set(str(rank), state.to_text())
        others = [] if rank == 0 and self._beats % (1 + self._world.world_size // 256) else self._others()
        keys = [*map(str, others), "verdict"]
        self._complete = self._complete or store.check([*map(str, self._others()), "verdict"])
        away = now - self._exchanged
        if away > 5 * BEAT_SECONDS:  # the store was away for everybody
            self._seen = {other: (known, when + away) for other, (known, when) in self._seen.items()}
        self._exchanged = now
        if not self._complete:
            return None
        *texts, said = (value.decode() for value in store.multi_get(keys))
        for other, text in zip(others, texts, strict=True):
            known = RankState.from_text(text)
            if other not in self._seen or self._seen[other][0].beat != known.beat or known.phase in (DONE, FAILED):
                self._seen[other] = (known, now)
        if said:
            return Verdict.from_text(said)
        if not others:
            return None
        seen = {other: Seen(known, now - when) for other, (known, when) in self._seen.items()}
        return decide(rank, {**seen, rank: Seen(state)}, self._silence, _process_state)

    def _others(self) -> list[int]:
        """Return the ranks whose states this one reads."""
        return [*range(1, self._world.world_size)] if self._world.rank == 0 else [0]

    # The end.

    def _end(self, verdict: Verdict, reachable: bool = True) -> None:
        """Print what belongs to this rank and exit. The first rank with a verdict prints the message."""
        if not self._ending.acquire(blocking=False):
            return
        last = threading.Timer(END_SECONDS, os._exit, [EXIT_CODE])  # if the store or a file system hangs
        last.daemon = True
        last.start()
        if verdict.stacks:
            self._dump_stacks()
        author = self._world.rank == 1 or self._world.local_rank == 0
        if reachable:
            with suppress(RuntimeError):
                agreed = self._store.compare_set("verdict", "", verdict.to_text()).decode()
                author = Verdict.from_text(agreed).author == self._world.rank
                self._wait_for_others(author, self._wake(verdict.lost) if author else ())
        if author:
            stacks = verdict.stacks and self._folder is not None
            _write(verdict.message + (f"\n  Stacks: {self._folder}/stacks-rank*.txt" if stacks else ""))
            with suppress(RuntimeError):
                if reachable:
                    self._store.set("end", "1")
        os._exit(EXIT_CODE)

    def _wake(self, lost: tuple[int, ...]) -> tuple[int, ...]:
        """Continue stopped processes of this machine, so that they write their stacks and exit. Returns the other lost ranks."""
        for rank in lost:
            known = self._seen[rank][0] if rank in self._seen else None
            if known is not None and _process_state(known) == "stopped":
                with suppress(OSError):
                    os.kill(known.pid, signal.SIGCONT)
                    lost = tuple(other for other in lost if other != rank)
        return lost

    def _wait_for_others(self, author: bool, lost: tuple[int, ...]) -> None:
        """Wait until all ranks have written their stacks, because a launcher kills the rest when the first one exits."""
        alive = [rank for rank in range(self._world.world_size) if rank not in lost and not self._ended(rank)]
        self._store.set(f"written/{self._world.rank}", "1")
        keys = [f"written/{rank}" for rank in alive] if author else ["end"]
        deadline = time.monotonic() + (0.4 if author else 0.6) * END_SECONDS
        while not self._store.check(keys) and time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 10)

    def _ended(self, rank: int) -> bool:
        return rank in self._seen and self._seen[rank][0].phase in (DONE, FAILED)

    def _dump_stacks(self) -> None:
        """Write the Python stacks of all threads to stderr and, where the run has a folder, into stacks-rankN.txt."""
        rank, state = self._world.rank, self._state()
        head = f"stacks of rank {rank}: process {state.pid} on {socket.gethostname()}, in {state.phase} for {state.age:.0f} s\n"
        with tempfile.TemporaryFile() as file:
            file.write(head.encode())
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            text = file.read().decode("utf-8", "replace")
        text = redacted(text)
        _write(text)
        if self._folder is not None:
            with suppress(OSError):
                (self._folder / f"stacks-rank{rank}.txt").write_text(text, encoding="utf-8")


def _write(text: str) -> None:
    """Write to standard error in one call, past locks that the main thread may hold."""
    with suppress(OSError):
        os.write(2, (shown(text.rstrip("\n")) + "\n").encode())


def _host() -> str:
    """Return the host name and the process namespace, in which a pid means the same process."""
    try:
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process_state(state: RankState) -> str:
    """Return `gone` or `stopped` for a process in this process namespace, else an empty string."""
    if "/" not in state.host or state.host != _host():
        return ""
    try:
        kind = Path(f"/proc/{state.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    return {"T": "stopped", "t": "stopped", "Z": "gone", "X": "gone"}.get(kind, "")
