"""A lost or hanging rank ends all ranks in time with one message; a rank that is slow for good reason does not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from gptoughts.engine.distributed import replicas, watch
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.distributed.verdict import (
    DISCONNECTED,
    DONE,
    FAILED,
    GONE_SECONDS,
    SILENT_SECONDS,
    RankState,
    Seen,
    Verdict,
    decide,
)
from gptoughts.engine.distributed.watch import FIRST_STEPS, LONG, FailureWatch, Pace, is_lost_connection, stall_seconds
from gptoughts.errors import ConfigError, LayerError, RunError
from gptoughts.hardware.world import World

ROOT = Path(__file__).parents[2]


def state(phase: str = "step", age: float = 100, limit: float = 180, reports: int = 7) -> RankState:
    return RankState(phase, reports, age, limit, host="n1/pid:[1]", pid=1234)


def verdict_of(*seen: Seen, me: int = 0, process: str = "") -> Verdict | None:
    return decide(me, dict(enumerate(seen)), SILENT_SECONDS, lambda state: process)


@pytest.mark.parametrize(
    "other",
    [
        Seen(state(age=5)),
        Seen(state("evaluation", age=500, limit=1800)),
        Seen(state("start", age=1799, limit=1800)),
        Seen(state(), silent=SILENT_SECONDS - 1),
        Seen(state("done", age=10_000), silent=10_000),
    ],
)
def test_a_job_whose_ranks_are_within_their_limits_goes_on(other: Seen) -> None:
    """Also if this rank waits beyond the limit of a step, as long as it has not ended alone."""
    waits = Seen(state(age=100 if other.state.phase == DONE else 1000))
    assert verdict_of(waits, other) is None


def test_a_stall_names_the_rank_that_is_behind() -> None:
    found = verdict_of(*[Seen(state(age=181, reports=9))] * 3, Seen(state("callback", age=1900, limit=1800, reports=8)))
    assert found is not None and found.stacks and not found.lost
    assert "behind: rank 3" in found.message and "ranks 0-2: in step (report 9) for 181 s, limit 180 s" in found.message
    assert "rank 3: in callback" in found.message
    even = verdict_of(Seen(state(age=181)), Seen(state(age=181)))
    assert even is not None and "none is behind" in even.message


def test_only_rank_0_sees_all_ranks_and_declares_a_stall_while_it_runs() -> None:
    stalled = Seen(state(age=181))
    assert verdict_of(stalled, stalled, me=1) is None
    found = verdict_of(Seen(state(DONE)), stalled, me=1)
    assert found is not None and found.author == 1


def test_a_silent_rank_is_lost_only_where_this_one_waits() -> None:
    silent = Seen(state(), silent=SILENT_SECONDS)
    assert verdict_of(Seen(state(age=SILENT_SECONDS - 1)), silent) is None
    found = verdict_of(Seen(state(age=SILENT_SECONDS)), silent)
    assert found is not None and found.lost == (1,) and found.stacks and "rank 1: no heartbeat for 40 s" in found.message
    stopped = verdict_of(Seen(state(age=SILENT_SECONDS)), silent, process="stopped")
    assert stopped is not None and "process 1234 on n1 is stopped by a signal" in stopped.message and stopped.stacks
    found = verdict_of(silent, Seen(state(age=SILENT_SECONDS)), me=1)
    assert found is not None and found.lost == (0,)


def test_what_is_known_to_be_gone_ends_the_job_in_seconds_without_stacks() -> None:
    waits, silent = Seen(state(age=GONE_SECONDS)), Seen(state(), silent=GONE_SECONDS)
    assert verdict_of(waits, silent) is None
    gone = verdict_of(waits, silent, process="gone")
    assert gone is not None and not gone.stacks and "process 1234 on n1 is gone" in gone.message
    broken = verdict_of(Seen(state(DISCONNECTED, age=GONE_SECONDS)), silent)
    assert broken is not None and not broken.stacks and broken.lost == (1,)
    failed = verdict_of(waits, Seen(state(FAILED)))
    assert failed is not None and not failed.stacks and "rank 1: ended with an error" in failed.message
    assert verdict_of(Seen(state(age=1)), Seen(state(FAILED))) is None


def test_states_and_verdicts_survive_the_store() -> None:
    assert RankState.from_text(state().to_text()) == state()
    verdict = Verdict("a\nb", True, (1, 3), 2)
    assert Verdict.from_text(verdict.to_text()) == verdict


def clocked(pace: Pace, phase: str, seconds: int) -> None:
    pace.report(phase)
    for _ in range(seconds):
        pace.advance(1)


def test_limits_follow_phases_and_slow_steps() -> None:
    pace = Pace(10)
    assert (pace.phase, pace.limit) == ("start", 10 * LONG)
    for _ in range(FIRST_STEPS):
        clocked(pace, "step", 60)  # compilation
        assert pace.limit == 10 * LONG
    clocked(pace, "step", 4)
    assert (pace.limit, pace.age) == (10, 4)
    pace.report("evaluation")
    assert (pace.limit, pace.age) == (10 * LONG, 0)
    clocked(pace, "step", 8)
    pace.report("step")
    assert pace.limit == 40
    assert pace.reports == FIRST_STEPS + 4


def test_a_suspended_process_has_not_stalled() -> None:
    pace = Pace(10)
    pace.advance(100_000)
    assert pace.age < 10


def test_the_variable() -> None:
    assert [stall_seconds({watch.VARIABLE: text}) for text in ("", "0", "2.5")] == [watch.STALL_SECONDS, 0, 2.5]
    for text in ("soon", "-1", "nan", "inf"):
        with pytest.raises(ConfigError, match="GPTOUGHTS_STALL_SECONDS: must be a number"):
            stall_seconds({watch.VARIABLE: text})


def test_errors_of_a_lost_peer() -> None:
    gloo = RuntimeError("[/pytorch/gloo/pair.cc:1] Connection closed by peer [127.0.0.1]:1")
    wrapped = LayerError("parallel=ddp: could not be applied")
    wrapped.__cause__ = gloo
    assert is_lost_connection(gloo) and is_lost_connection(wrapped) and is_lost_connection(dist.DistBackendError("x"))
    assert not is_lost_connection(RuntimeError("shape mismatch"))
    assert not is_lost_connection(BrokenPipeError(32, "Broken pipe")) and not is_lost_connection(None)


def test_one_process_has_no_threads() -> None:
    import threading

    before = threading.active_count()
    with FailureWatch(World()) as alone:
        alone.start(Ranks(World(), torch.device("cpu")))
        assert not alone.active and threading.active_count() == before


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FailureWatch, FailureWatch]]:
    """Two watches in one process on a real store, without their threads."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(watch, "default_store", lambda: store)
    monkeypatch.setattr(watch.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None, join=lambda seconds: None))
    ranks: Any = SimpleNamespace(first=True, largest=lambda value: 1.0)
    first = FailureWatch(World(0, 0, 2, 2, "torchrun"))
    first.start(ranks)
    second = FailureWatch(World(1, 1, 2, 2, "torchrun"))
    second.start(ranks)
    yield first, second


def test_ranks_exchange_states_through_the_store(pair: tuple[FailureWatch, FailureWatch]) -> None:
    first, second = pair
    second.report("evaluation")
    assert second._exchange() is None and first._exchange() is None
    assert first._seen[1][0].phase == "evaluation" and second._seen[0][0].phase == "start"
    for _ in range(40):  # rank 1 sends no heartbeat
        first._pace.advance(1)
    first._seen[1] = (first._seen[1][0], 0.0)
    first._exchanged = first._pace.now
    found = first._exchange()
    assert found is not None and found.lost == (1,) and found.author == 0
    first._store.set("verdict", found.to_text())
    assert second._exchange() == found


def test_weights_that_differ_between_ranks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other ranks are fixed vectors of checksums here; real ranks are in the slow tier."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2, dtype=torch.bfloat16))
    theirs = torch.stack([replicas._checksum(weight.data) for weight in model.parameters()])

    def gather(pair: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([pair[0], theirs[3]]), pair, torch.stack([pair[0], theirs[3]])]

    engine: Any = SimpleNamespace(ranks=SimpleNamespace(size=3, gather=gather), bare=model)

    def reduce(tensor: torch.Tensor, op: Any, group: Any) -> None:
        assert group is None
        tensor.copy_(torch.minimum(tensor, theirs) if op == dist.ReduceOp.MIN else torch.maximum(tensor, theirs))

    monkeypatch.setattr(dist, "all_reduce", reduce)
    replicas.demand_equal_weights(engine)
    with torch.no_grad():
        model[1].bias[0] += 0.5
    with pytest.raises(RunError, match=r"1 of 4 differ between ranks, .* one model. Found 1.bias: ranks 0, 2 \| rank 1.\n"):
        replicas.demand_equal_weights(engine)


# Real ranks under torchrun.


class Job:
    """What became of two ranks, one of which had a fault."""

    def __init__(self, kind: str, folder: Path, restarts: int, seconds: float) -> None:
        folder.mkdir()
        (folder / "text.txt").write_text("".join(f"line {number} of a text\n" for number in range(600)), encoding="utf-8")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [*torchrun, f"--max-restarts={restarts}", "-m", "tests.support.watch_worker", kind, str(folder)]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), watch.VARIABLE: str(seconds)}
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=400)
        fault = folder / "fault"
        self.seconds = time.time() - float(fault.read_text()) if fault.exists() else 0.0
        self.code, self.said, self.run = done.returncode, done.stdout + done.stderr, folder / "run"

    @property
    def errors(self) -> list[str]:
        return re.findall(r"^error: .*", self.said, re.MULTILINE)

    @property
    def stacks(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in sorted(self.run.glob("stacks-rank*.txt"))}

    def losses(self) -> dict[int, float]:
        rows = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    folder = tmp_path_factory.mktemp("watch")
    return cache(lambda kind, restarts=0, seconds=5: Job(kind, folder / f"{kind}{restarts}", restarts, seconds))


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_with_one_message(job: Callable[..., Job]) -> None:
    done = job("kill", seconds=180)
    assert done.code != 0 and done.seconds < 60, done.said[-3000:]
    assert len(done.errors) == 1 and re.search(r"rank 1: no heartbeat .* is gone\.", done.errors[0]), done.said[-3000:]
    assert done.stacks == {} and 'distributed/watch.py", line' not in done.said and "exitcode  : 76" in done.said


@pytest.mark.slow
def test_a_rank_that_sleeps_in_python_is_found_in_its_stacks(job: Callable[..., Job]) -> None:
    done = job("sleep")
    assert done.code != 0, done.said[-3000:]
    assert len(done.errors) == 1 and "behind: rank 1" in done.errors[0], done.said[-3000:]
    assert list(done.stacks) == ["stacks-rank0.txt", "stacks-rank1.txt"]
    assert "in sleep_in_python" in done.stacks["stacks-rank1.txt"] and "sleep_in_python" not in done.stacks["stacks-rank0.txt"]
    assert "trainer.py" in done.stacks["stacks-rank0.txt"]
    assert all(stack.splitlines()[0] in done.said for stack in done.stacks.values())


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_everything_ends(job: Callable[..., Job]) -> None:
    done = job("stop")
    assert done.code != 0 and done.seconds < 60, done.said[-3000:]
    assert len(done.errors) == 1 and re.search("rank 1: no heartbeat .* is stopped by a signal", done.errors[0]), done.said[
        -3000:
    ]
    assert list(done.stacks) == ["stacks-rank0.txt", "stacks-rank1.txt"]


@pytest.mark.slow
def test_a_torchrun_restart_continues_bit_for_bit_and_a_long_callback_is_left_alone(job: Callable[..., Job]) -> None:
    """The reference has a callback on one rank that takes longer than the limit of a step."""
    reference, again = job("long", seconds=3), job("kill", restarts=1, seconds=180)
    assert (reference.code, again.code) == (0, 0), reference.said[-2000:] + again.said[-3000:]
    assert "resuming from" in again.said and reference.errors == []
    assert reference.losses() == again.losses() and len(reference.losses()) == 8
    ours, theirs = (load_file(one.run / "checkpoints" / "step-000008" / "model.safetensors") for one in (reference, again))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_weights_of_one_rank_that_change_stop_the_run_at_the_next_save(job: Callable[..., Job]) -> None:
    done = job("weights")
    assert done.code != 0 and "weights: 1 of" in done.said, done.said[-3000:]
    assert re.search(r"differ between ranks, .* Found embed.weight: rank 0 \| rank 1\.", done.said), done.said[-3000:]
    assert (done.run / "checkpoints" / "latest").read_text().strip() == "step-000004"
