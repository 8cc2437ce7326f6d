"""Measure variants in child processes that take turns; every round runs all of them in a different order.

The speed of a shared machine drifts by more than the differences of interest: a round holds every variant once, and only ratios within a
round are compared. If the variants do not fit into memory together, each round starts every variant again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from time import perf_counter
from typing import Any

from gptoughts import errors
from gptoughts.diagnostics.bench.variant import OUT_OF_MEMORY, Job
from gptoughts.diagnostics.bench.variant_process import VariantFailed, VariantProcess, start_variant

Say = Callable[[str], None]

ROOM = 2.0
"""Free memory required for the next process, as a multiple of the largest so far. The margin is for other programs: when a system runs
out of memory, it may kill any process."""
USER_ERRORS = ("ConfigError", "DataError", "CheckpointError", "PlanError", "RunError")


class Turns(StrEnum):
    """How processes share the machine."""

    TOGETHER = "interleaved, all alive"
    APART = "interleaved, one at a time, restarted each round"
    IN_A_ROW = "one after the other, all steps at once"


class NoRoom(Exception):
    """The variants do not fit into memory together."""


@dataclass
class Result:
    """Figures of one variant: its `ready` answer, seconds per step of every round, loss of every step, peak memory."""

    ready: dict[str, Any] = field(default_factory=dict)
    start_seconds: float | None = None
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    clock_mhz: list[int] = field(default_factory=list)
    failure: str = ""
    """Why the variant is not counted; empty if it is."""
    diverged: bool = False
    """Whether the failure is a loss that is not finite."""

    @property
    def counted(self) -> bool:
        """Return whether the figures are valid."""
        return not self.failure and bool(self.seconds)


def measure(
    jobs: Mapping[str, Job], rounds: int, steps: int, say: Say, *, turns: Turns | None = None, otherwise: Turns = Turns.APART
) -> tuple[dict[str, Result], Turns]:
    """Run every job for `rounds` times `steps` steps. `turns` None interleaves them if they fit into memory, else uses `otherwise`.

    Raises an error of the user (missing text, invalid sizes) if the first variant meets it; errors of later variants are in their
    `failure`.
    """
    if turns in (None, Turns.TOGETHER):
        try:
            return _together(jobs, rounds, steps, say, turns is Turns.TOGETHER), Turns.TOGETHER
        except NoRoom as error:
            say(f"{error}: {otherwise}")
            turns = otherwise
    assert turns is not None
    if turns is Turns.APART:
        return _apart(jobs, rounds, steps, say), turns
    results: dict[str, Result] = {}
    for name, job in jobs.items():
        results |= _together({name: job}, rounds, steps, lambda text, name=name: say(f"{name}, {text}"), True)  # type: ignore[misc]
    return results, turns


def order(names: list[str], number: int) -> list[str]:
    """Return the order of a round: rotated by its number, every other round reversed."""
    first = number % len(names) if names else 0
    turned = names[first:] + names[:first]
    return turned if number % 2 == 0 else turned[::-1]


def _together(jobs: Mapping[str, Job], rounds: int, steps: int, say: Say, forced: bool) -> dict[str, Result]:
    results = {name: Result() for name in jobs}
    children: dict[str, VariantProcess] = {}

    def drop_failed(name: str) -> None:
        """Close a failed variant. Raises NoRoom if it ran out of memory beside others: alone it may fit."""
        result = results[name]
        _refuse_crowding(name, result, len(children), forced)
        if result.failure:
            say(f"  {name} not counted: {result.failure}")
            children.pop(name).close()

    with ExitStack() as stack:
        for number, (name, job) in enumerate(jobs.items()):
            if not forced and not _roomy(results.values()):
                raise NoRoom(f"no memory for {len(jobs)} processes at once, {number} started")
            say(f"starting {number + 1} of {len(jobs)}: {name}")
            children[name] = stack.enter_context(start_variant(job))
            _start(children[name], results[name], not any(one.ready for one in results.values()))
            drop_failed(name)
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for name in order(list(children), number):
                _run(children[name], results[name], steps)
                drop_failed(name)
    return results


def _refuse_crowding(name: str, result: Result, alive: int, forced: bool) -> None:
    if result.failure.startswith(OUT_OF_MEMORY) and alive > 1 and not forced:
        raise NoRoom(f"{name} ran out of memory beside {alive - 1} others")


def _apart(jobs: Mapping[str, Job], rounds: int, steps: int, say: Say) -> dict[str, Result]:
    results = {name: Result() for name in jobs}
    for number in range(rounds):
        alive = [name for name in jobs if not results[name].failure]
        for place, name in enumerate(order(alive, number)):
            result = results[name]
            say(f"round {number + 1} of {rounds}, {place + 1} of {len(alive)}: {name}")
            with start_variant(jobs[name]) as child:
                result.losses = []  # each start trains the same steps
                _start(child, result, not any(one.ready for one in results.values()))
                if not result.failure:
                    _run(child, result, steps)
            if result.failure:
                say(f"  {name} not counted: {result.failure}")
    return results


def _roomy(results: Iterable[Result]) -> bool:
    """Return whether one more process fits into memory, judged by the earlier ones."""
    ready = [one.ready for one in results if one.ready]
    held = [one["held_bytes"] for one in ready if one["held_bytes"] is not None]
    free = ready[-1]["free_bytes"] if ready else None
    return free is None or not held or free >= ROOM * max(held)


def _start(child: VariantProcess, result: Result, first: bool) -> None:
    began = perf_counter()
    try:
        result.ready = child.request(child.job.to_json())
    except VariantFailed as error:
        if first and error.kind in USER_ERRORS:
            raise getattr(errors, error.kind)(error.message) from None
        result.failure = str(error)
        return
    if result.start_seconds is None:
        result.start_seconds = perf_counter() - began
    _add_losses(result, result.ready["losses"])
    result.peak_bytes = result.peak_bytes or result.ready["peak_bytes"]
    inactive = [line for line in result.ready["evidence"] if line["status"] == "inactive"]
    if inactive:
        result.diverged = False  # the loss says nothing about a layer that is not active
        result.failure = "inactive: " + "; ".join(f"{line['slot']}={line['layer']}: {line['proof']}" for line in inactive)


def _run(child: VariantProcess, result: Result, steps: int) -> None:
    try:
        ran = child.request({"steps": steps})
    except VariantFailed as error:
        result.failure = str(error)
        return
    result.seconds.append(ran["seconds"] / ran["steps"])
    _add_losses(result, ran["losses"])
    if ran["peak_bytes"] is not None:
        result.peak_bytes = ran["peak_bytes"]
    result.clock_mhz += [ran["clock_mhz"]] if ran["clock_mhz"] else []


def _add_losses(result: Result, losses: list[float]) -> None:
    """Append the losses; a variant with a loss that is not finite is not counted."""
    result.losses += losses
    wrong = next((step for step, loss in enumerate(result.losses, 1) if not math.isfinite(loss)), None)
    if wrong is not None and not result.failure:
        result.failure, result.diverged = f"loss not finite from step {wrong} on", True
