"""The processes of one bench variant as its parent sees them: one child, or one child per rank that answer as one."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any, Protocol, Self

from gptoughts.diagnostics.bench import variant
from gptoughts.diagnostics.bench.variant import OUT_OF_MEMORY, Job
from gptoughts.planning.environment import GUARD
from gptoughts.processes import Child, ChildDied, kill_group

LOOPBACK = "127.0.0.1"
LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
"""Variables of another launcher that must not reach the ranks of a variant."""


class VariantFailed(Exception):
    """A variant that cannot continue: kind of error and message."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}" if message else kind)
        self.kind, self.message = kind, message


class VariantProcess(Protocol):
    """What `children.measure` needs: requests are answered by the whole variant."""

    job: Job

    def request(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to `message`. Raises VariantFailed."""
        ...

    def close(self) -> None:
        """End all processes of the variant."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: object, *_: object) -> None: ...


class Variant(Child):
    """The child process of one job: the first request is the job, each further one `{"steps": n}`."""

    def __init__(self, job: Job, rank: Mapping[str, str] | None = None) -> None:
        super().__init__(variant.__name__, "serve", environment=environment_of(job) | dict(rank or {}))
        self.job = job

    def request(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to `message`. Raises VariantFailed."""
        try:
            answer: dict[str, Any] = self.ask(message)[0]
        except ChildDied as error:
            if error.code == -signal.SIGKILL:
                raise VariantFailed(OUT_OF_MEMORY, "killed by SIGKILL") from None
            raise VariantFailed(str(error), "") from None
        if "failed" in answer:
            raise VariantFailed(answer["failed"]["kind"], answer["failed"]["message"])
        return answer


class RankGroup:
    """One child per rank of a job, on this machine. A request goes to all ranks at once; if one fails, the others are killed."""

    def __init__(self, job: Job) -> None:
        self.job = job
        meeting = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port())}
        self.ranks: list[Variant] = []
        try:
            for rank, environment in enumerate(job.rank_environments):
                own = rank_variables(rank, len(job.rank_environments))
                self.ranks.append(Variant(job, {**environment, **own, **meeting}))
        except BaseException:
            self._kill()
            raise

    def request(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return the merged answer of all ranks. Raises VariantFailed with the failure of the rank that failed first."""
        failure: VariantFailed | None = None
        with ThreadPoolExecutor(len(self.ranks)) as pool:
            asked: dict[Future[dict[str, Any]], int] = {
                pool.submit(child.request, message): rank for rank, child in enumerate(self.ranks)
            }
            try:
                for future in as_completed(asked):
                    error = future.exception()
                    if isinstance(error, VariantFailed) and failure is None:
                        failure = VariantFailed(error.kind, f"rank {asked[future]}: {error.message}".removesuffix(": "))
                        self._kill()  # the others would wait for it in a collective
                    elif error is not None and failure is None:
                        raise error
            except BaseException:
                self._kill()
                raise
        if failure is not None:
            raise failure
        return merged([future.result() for future in sorted(asked, key=lambda future: asked[future])])

    def close(self) -> None:
        """Close all ranks at once, since leaving a process group may need all of them."""
        with ThreadPoolExecutor(len(self.ranks) or 1) as pool:
            list(pool.map(Variant.close, self.ranks))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._kill()
        self.close()

    def _kill(self) -> None:
        for child in self.ranks:
            if child.process.poll() is None:
                kill_group(child.process.pid)


def start_variant(job: Job) -> VariantProcess:
    """Start the processes of a job: one per rank if it names ranks."""
    return RankGroup(job) if job.rank_environments else Variant(job)


def environment_of(job: Job) -> dict[str, str]:
    """Return the variables of a variant's process: this process's, without those gptoughts set for another plan, plus the plan's."""
    ours = os.environ.get(GUARD, "").partition(":")[2].split(",")
    left_out = (GUARD, *ours, *LAUNCHER_VARIABLES)
    return {**{name: value for name, value in os.environ.items() if name not in left_out}, **job.environment}


def rank_variables(rank: int, size: int) -> dict[str, str]:
    """Return the variables that torchrun would set for one rank of a single machine."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}


def free_port() -> int:
    """Return a port of this machine that was free a moment ago."""
    with socket.socket() as found:
        found.bind((LOOPBACK, 0))
        port: int = found.getsockname()[1]
        return port


def merged(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the answers of all ranks as one: the slowest rank's time, the largest peak, and the losses, which all ranks share."""
    first = answers[0]
    found = dict(first)
    for key, of in _MERGES.items():
        values = [one[key] for one in answers if key in one]
        if values:
            found[key] = None if None in values else of(values)
    for key in ("collectives",):
        if key in first:
            found[key] = [value for one in answers for value in one[key]]
    found["peak_bytes_of_ranks"] = [one["peak_bytes"] for one in answers]
    if "settings" in first:
        found["settings_of_ranks"] = [one["settings"] for one in answers]
    if "evidence" in first:
        elsewhere = [line for one in answers[1:] for line in one["evidence"] if line["status"] == "inactive"]
        found["evidence"] = [*first["evidence"], *elsewhere]
    return found


_MERGES: Mapping[str, Any] = {
    "seconds": max,
    "first_step_seconds": max,
    "peak_bytes": max,
    "held_bytes": sum,
    "free_bytes": min,
    "clock_mhz": min,
}
