"""Ranks meet within a limit or one of them says who is missing; they wait for a slow tokenizer; what differs among them is shown once."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gptoughts.engine.distributed import rendezvous
from gptoughts.engine.distributed.ranks import differing
from gptoughts.engine.distributed.rendezvous import Meeting
from gptoughts.errors import ConfigError, RunError, ToldElsewhere
from gptoughts.hardware.endpoint import Endpoint
from gptoughts.hardware.world import World
from tests.support.golden_files import ROOT


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "LONGEST_PAUSE", 0.05)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def meeting(rank: int, size: int, port: int, seconds: int, file: Path | None = None) -> Meeting:
    """One rank's meeting, over TCP or a file."""
    world = World(rank, rank, size, size, "srun")
    place = Endpoint("127.0.0.1", port, "MASTER_ADDR=127.0.0.1", rank == 0, file)
    return Meeting(world, place, rendezvous._store(world, place, seconds), seconds)


def together(ranks: int, work: Callable[[int], object]) -> list[object]:
    """Results of ranks in threads of this process; of a failed one its exception."""
    with ThreadPoolExecutor(ranks) as pool:
        jobs = [pool.submit(work, rank) for rank in range(ranks)]
    return [job.exception() or job.result() for job in jobs]


@pytest.mark.parametrize("over", ["tcp", "file"])
def test_one_rank_says_who_is_missing(over: str, tmp_path: Path) -> None:
    port, file = free_port(), tmp_path / "meet" if over == "file" else None
    made: list[Meeting] = []

    def arrive(rank: int) -> None:
        one = meeting(rank, 4, port, 2, file)
        made.append(one)  # the store of rank 0 stays
        one.wait_for_all()

    found = together(2, arrive)
    said = [str(error) for error in found if type(error) is RunError]
    assert len(said) == 1 and sum(isinstance(error, ToldElsewhere) for error in found) == 1
    assert "2 of 4 ranks arrived within 2 s; missing: ranks 2-3" in said[0]
    for words in (
        "MASTER_ADDR=127.0.0.1",
        socket.gethostname(),
        "firewall",
        "GLOO_SOCKET_IFNAME",
        "GPTOUGHTS_RENDEZVOUS_SECONDS",
    ):
        assert words in said[0]


def test_nobody_answers() -> None:
    port = free_port()
    with pytest.raises(RunError, match=f"rendezvous at 127.0.0.1:{port}: no answer within 1 s on rank 1"):
        meeting(1, 2, port, 1)


def test_a_port_in_use() -> None:
    with socket.socket(socket.AF_INET6) as other:
        other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        other.bind(("::", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} is in use on (.|\n)*MASTER_PORT with another number"):
            meeting(0, 2, port, 1)


def test_the_first_rank_of_a_machine_reads_data_first_and_errors_are_said_once() -> None:
    port, order = free_port(), list[int]()

    def read(rank: int) -> object:
        one = meeting(rank, 3, port, 20)
        one.wait_for_all()
        result = one.wait_for_data(lambda: order.append(rank) or rank * 10)
        made.append(one)
        return result, one.claim("the same error"), one.claim(f"error of {rank}")

    made: list[Meeting] = []
    found = together(3, read)
    assert order[0] == 0 and sorted(order) == [0, 1, 2]
    assert [row[0] for row in found] == [0, 10, 20]  # type: ignore[index]
    assert sum(row[1] for row in found) == 1 and all(row[2] for row in found)  # type: ignore[index]


def test_a_rank_without_data_ends_the_others() -> None:
    port, made = free_port(), list[Meeting]()

    def read(rank: int) -> None:
        one = meeting(rank, 2, port, 20)
        made.append(one)
        one.wait_for_all()
        one.wait_for_data(lambda: 1 // rank)

    found = together(2, read)
    assert isinstance(found[0], ZeroDivisionError) and isinstance(found[1], ToldElsewhere)
    assert not str(found[1]), "it prints nothing"


def test_two_values_and_their_ranks_are_shown() -> None:
    said = str(differing("the plan", ["1\nslot a\nslot b", "2\nslot c\nslot d", "1\nslot a\nslot b"]))
    assert said.startswith(
        "the plan: differs between ranks. Found \non ranks 0, 2:\nslot a\nslot b\non rank 1:\nslot c\nslot d"
    )


def start(ranks: int, *words: str, cwd: Path, mpi: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a module in ranks of torchrun, or of mpirun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *words]
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", str(ranks), sys.executable, *words]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    command = mpirun if mpi else torchrun
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=400)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_a_tokenizer_slower_than_a_collective_may_be(launcher: str, tmp_path: Path) -> None:
    """One rank tokenizes, longer than the limit of a collective; then both train on; a plan that differs is shown by rank 0."""
    if launcher == "mpirun" and shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed: apt-get install openmpi-bin")
    (tmp_path / "text.txt").write_text("some text of which there is enough\n" * 200, encoding="utf-8")
    ran = start(
        2,
        "-m",
        "tests.support.rendezvous_worker",
        cwd=tmp_path,
        mpi=launcher == "mpirun",
        GPTOUGHTS_COLLECTIVE_SECONDS="20",
        SLOW="25",
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert (first["tokenized"], second["tokenized"]) == (1, 0)
    assert first["launcher"] == {"torchrun": "torchrun", "mpirun": "openmpi"}[launcher]
    assert first["sum"] == second["sum"] == 2.0
    assert first["equal"] and second["equal"]
    assert "table of 0" in first["said"] and "table of 1" in first["said"] and "on rank 1" in first["said"]
    assert second["said"] == "" and second["code"] == first["code"] == 2
