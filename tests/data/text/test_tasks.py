"""Tasks of a job tokenize one corpus together: the bytes of one process, errors of any task, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gptoughts.data.text import tasks as module
from gptoughts.data.text.tasks import Tasks
from gptoughts.data.text.tokenize import tokenize
from gptoughts.data.text.workers import Encoded, Piece
from gptoughts.errors import DataError
from gptoughts.hardware.world import World, world_from_environment
from tests.data.text.test_tokenize import digest, write_corpus

CHILD = """
import os, sys
from gptoughts.data.text import job, tasks, tokenize
from gptoughts.errors import DataError
from gptoughts.hardware.world import world_from_environment
job.JOURNAL_SECONDS, job.TASK_CHARACTERS, tasks.LIMIT_SECONDS = 0.0, 3000, float(sys.argv[4])
options = dict(train_bpe=300, val_fraction=0.2, shard_tokens=7001, processes=int(sys.argv[3]), overwrite="overwrite" in sys.argv)
try:
    index = tokenize.tokenize(sys.argv[1], "bpe", sys.argv[2], world=world_from_environment(os.environ), **options)
except DataError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(2)
print(index.splits["train"].tokens)
"""


def slurm(task: int, count: int, step: str = "0") -> dict[str, str]:
    """The variables that srun sets in a task of one node."""
    numbers = {"SLURM_PROCID": task, "SLURM_STEP_NUM_TASKS": count, "SLURM_LOCALID": task, "SLURM_STEP_TASKS_PER_NODE": count}
    return {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": step, "SLURM_NODEID": "0"} | {
        name: str(value) for name, value in numbers.items()
    }


def start(source: Path, out: Path, count: int, *, processes: int = 1, limit: float = 60, step: str = "0", words: tuple[str, ...] = ()) -> list[subprocess.Popen[str]]:  # fmt: skip
    """Start all tasks of a job; `limit` is how long the first one waits."""
    path = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", CHILD, str(source), str(out), str(processes)]
    return [
        subprocess.Popen(
            [*command, str(60 if task else limit), *words],
            env={**os.environ, "PYTHONPATH": path, **slurm(task, count, step)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for task in range(count)
    ]


def ends(jobs: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    return [(job.wait(120), job.stdout.read().strip() if job.stdout else "") for job in jobs]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "text.jsonl", 200)
    return tmp_path / "text.jsonl"


def alone(source: Path, out: Path) -> dict[str, str]:
    """The files that one process writes."""
    (code, _), *_ = ends(start(source, out, 1))
    assert code == 0
    return digest(out)


def test_three_tasks_write_the_bytes_of_one_process(source: Path, tmp_path: Path) -> None:
    expected = alone(source, tmp_path / "one")
    found = ends(start(source, tmp_path / "three", 3, processes=2))
    assert [code for code, _ in found] == [0, 0, 0]
    assert len({text for _, text in found}) == 1, "every task returns the index"
    assert digest(tmp_path / "three") == expected
    again = ends(start(source, tmp_path / "three", 3))  # complete already
    assert again == found
    assert ends(start(source, tmp_path / "three", 2, words=("overwrite",), step="1")) == found[:2]
    assert digest(tmp_path / "three") == expected


def test_a_killed_job_goes_on_with_another_number_of_tasks(source: Path, tmp_path: Path) -> None:
    expected = alone(source, tmp_path / "one")
    out = tmp_path / "killed"
    jobs = start(source, out, 3)
    deadline = time.monotonic() + 60
    while not list(out.glob("train_000002*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    for job in jobs:
        job.send_signal(signal.SIGKILL)
    ends(jobs)
    assert (out / module.FOLDER).is_dir(), "killed while it worked"
    assert [code for code, _ in ends(start(source, out, 2, step="1"))] == [0, 0]
    assert digest(out) == expected


def test_a_lost_task_ends_the_others_and_keeps_the_tokens(source: Path, tmp_path: Path) -> None:
    jobs = start(source, tmp_path / "lost", 3, limit=3)
    jobs[2].send_signal(signal.SIGKILL)
    (first, said), (second, told), _ = ends(jobs)
    assert (first, second) == (2, 2)
    assert "WorkerDied" in said and "task 2 of 3 left no tokens in 3 s; do all nodes see this folder?" in said
    assert "task 0 of 3 ended early, its message says why" in told
    assert (tmp_path / "lost" / "progress.json").exists(), "a later job continues"


def test_an_error_of_any_task_is_told_by_the_first(tmp_path: Path) -> None:
    texts = tmp_path / "text.jsonl"
    write_corpus(texts, 200)
    with texts.open("a") as file:
        file.write('{"other": 1}\n')
    found = ends(start(texts, tmp_path / "bad", 3))
    assert [code for code, _ in found] == [2, 2, 2]
    assert "text.jsonl" in found[0][1]
    assert not (tmp_path / "bad" / "progress.json").exists(), "a corrected text begins anew"


def test_an_error_in_the_share_of_another_task_reaches_the_first(tmp_path: Path) -> None:
    first, second = (Tasks(tmp_path, number, 2, "job") for number in (0, 1))
    groups = [[Piece("train", f"document {number}", "text", True)] for number in range(2)]

    def encode(some: Iterator[list[Piece]]) -> Iterator[Encoded]:
        for group in some:
            if group[0].where == "document 1":
                raise DataError("document 1: no such character")
            yield Encoded(group, np.zeros(5, dtype=np.uint16), [5])

    first.begin(0, {})
    assert second.follow(overwrite=False) == {"identity": "job", "pieces": 0}
    with pytest.raises(DataError, match="no such character"), second.reporting():
        second.contribute(groups, encode)
    taken = first.collect(groups, encode)
    assert next(taken).lengths == [5]
    with pytest.raises(DataError, match="task 1 of 2: document 1: no such character"):
        next(taken)
    with pytest.raises(RuntimeError), first.leading():
        raise RuntimeError
    with pytest.raises(DataError, match="task 0 of 2 ended early"):
        second.follow(overwrite=False)


def test_a_task_that_cannot_write_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "text.jsonl", 5)
    for name, value in slurm(1, 2).items():
        monkeypatch.setenv(name, value)

    def full(self: object, plan: object) -> None:
        raise OSError(28, "No space left on device", "tokens/00000001.tokens")

    monkeypatch.setattr(module.Tasks, "follow", full)
    with pytest.raises(DataError, match=r"tokens/00000001.tokens: cannot be written \(No space left on device\)"):
        tokenize(str(tmp_path / "text.jsonl"), "bytes", tmp_path / "out", world=world_from_environment(os.environ))
    first = Tasks(tmp_path / "missing" / "folder", 0, 2, "job")
    with pytest.raises(RuntimeError, match="the cause"), first.leading():  # nothing can be written for the others
        raise RuntimeError("the cause")


def test_tasks_need_a_name_of_their_job(tmp_path: Path) -> None:
    assert Tasks.of(World(), {}, tmp_path) is None
    world = world_from_environment(slurm(1, 4))
    found = Tasks.of(world, slurm(1, 4), tmp_path)
    assert found is not None and (found.number, found.count, found.first) == (1, 4, False)
    assert Tasks.of(world, {}, tmp_path) is None
    assert Tasks.of(World(0, 0, 2, 2, "mpich"), {"PMI_RANK": "0"}, tmp_path) is None


def test_a_task_that_cannot_begin_says_which_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT_SECONDS", 0.1)
    (tmp_path / "t.txt").write_text("a text of a few words\n" * 50)
    for name, value in slurm(1, 2).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DataError, match=r"out: task 0 of 2 did not begin in 0 s; do all nodes see this folder"):
        tokenize(str(tmp_path / "t.txt"), "chars", tmp_path / "out", world=world_from_environment(os.environ))
