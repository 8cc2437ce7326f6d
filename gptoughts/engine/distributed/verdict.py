"""Decide from the states of all ranks whether the job has failed: a lost rank, or no progress. Pure functions of times."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

SILENT_SECONDS = 40.0
"""Seconds without a heartbeat after which a rank is lost, if this rank waits too. Below 60 with the time to end all ranks."""
GONE_SECONDS = 4.0
"""The same where more is known: its process is gone, it ended with an error, or a collective has failed."""

DONE, FAILED, DISCONNECTED = "done", "failed", "disconnected"
"""Phases of a rank that ended, that raised an error, and whose collective failed because a peer is gone."""


@dataclass(frozen=True)
class RankState:
    """What a rank publishes with every heartbeat."""

    phase: str
    reports: int
    """Progress reports so far; the rank with fewest is behind."""
    age: float
    """Seconds since the last report, by the rank's own clock."""
    limit: float
    """Seconds that the phase may last without a report."""
    beat: int = 0
    host: str = ""
    pid: int = 0

    def to_text(self) -> str:
        """Return the state as JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(text: str) -> RankState:
        """Return the state of `to_text`."""
        return RankState(**json.loads(text))


@dataclass(frozen=True)
class Seen:
    """The newest state of a rank, and for how many seconds it has sent no heartbeat."""

    state: RankState
    silent: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """Why the job ends. With `stacks` every rank prints its Python stacks first."""

    message: str
    stacks: bool
    lost: tuple[int, ...] = ()
    author: int = 0
    """The rank that decided, and prints the message."""

    def to_text(self) -> str:
        """Return the verdict as JSON."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(text: str) -> Verdict:
        """Return the verdict of `to_text`."""
        found = json.loads(text)
        return Verdict(found["message"], found["stacks"], tuple(found["lost"]), found["author"])


def decide(
    me: int, seen: Mapping[int, Seen], silence: float, process: Callable[[RankState], str] = lambda state: ""
) -> Verdict | None:
    """Return why the job has failed, None while it has not.

    A rank is lost if it is silent and this rank makes no progress either, so a busy process that beats late is not. The job is stalled if
    every rank that has not ended is beyond the limit of its phase: one rank in a long evaluation keeps the others waiting for good reason.

    seen     states by rank: all of them on rank 0; rank 0 and this one elsewhere
    silence  seconds without a heartbeat after which a rank is lost
    process  returns "gone" or "stopped" for a process that this machine can look up, else an empty string
    """
    mine = seen[me].state
    broken = any(one.state.phase == DISCONNECTED for one in seen.values())
    lost: dict[int, str] = {}
    for rank, one in seen.items():
        if rank == me or one.state.phase == DONE:
            continue
        if one.state.phase == FAILED:
            if mine.age >= GONE_SECONDS:
                lost[rank] = "ended with an error, and its message says why"
            continue
        known = process(one.state) if one.silent >= GONE_SECONDS else ""
        patience = min(silence, GONE_SECONDS) if broken or known == "gone" else silence
        if one.silent >= patience and mine.age >= patience:
            lost[rank] = _silence(one, known)
    if lost:
        unknown = not broken and any(" is gone" not in text and "ended" not in text for text in lost.values())
        return Verdict(_lost_message(lost, seen), unknown, tuple(lost), me)
    if me == 0 or seen[0].state.phase == DONE:
        running = {rank: one.state for rank, one in seen.items() if one.state.phase not in (DONE, FAILED)}
        if running and all(state.age > state.limit for state in running.values()):
            return Verdict(_stall_message(running), True, author=me)
    return None


def _silence(one: Seen, known: str) -> str:
    place = f"process {one.state.pid} on {one.state.host.partition('/')[0]}"
    state = {"gone": f"{place} is gone", "stopped": f"{place} is stopped by a signal"}.get(known, place)
    return f"no heartbeat for {one.silent:.0f} s, last seen in {_phase(one.state)}: {state}"


def _phase(state: RankState) -> str:
    return f"{state.phase} (report {state.reports})"


def _lost_message(lost: Mapping[int, str], seen: Mapping[int, Seen]) -> str:
    lines = [f"error: rank {rank}: {text}." for rank, text in lost.items()]
    others = {rank: one.state for rank, one in seen.items() if rank not in lost and one.state.phase != DONE}
    return "\n".join([*lines, *(f"  {line}" for line in _groups(others))])


def _stall_message(running: Mapping[int, RankState]) -> str:
    least = min(state.reports for state in running.values())
    behind = [rank for rank, state in running.items() if state.reports == least]
    who = f"behind: {_numbers(behind)}" if len(behind) < len(running) else "none is behind the others"
    return "\n".join(
        [
            f"error: ranks: no progress beyond the limit of every rank; {who}.",
            *(f"  {line}" for line in _groups(running)),
            "  Try: the stacks of every rank; GPTOUGHTS_STALL_SECONDS=N for longer limits",
        ]
    )


def _groups(states: Mapping[int, RankState]) -> list[str]:
    """Return one line per phase and number of reports."""
    groups: dict[str, list[int]] = {}
    for rank, state in states.items():
        groups.setdefault(_phase(state), []).append(rank)
    return [
        f"{_numbers(ranks)}: in {phase} for {min(states[rank].age for rank in ranks):.0f} s, "
        f"limit {max(states[rank].limit for rank in ranks):.0f} s"
        for phase, ranks in groups.items()
    ]


def _numbers(ranks: Iterable[int]) -> str:
    """Return `rank 3` or `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    text = ", ".join("-".join(map(str, run)) for run in runs)
    return f"rank {text}" if len(runs) == 1 and len(runs[0]) == 1 else f"ranks {text}"
