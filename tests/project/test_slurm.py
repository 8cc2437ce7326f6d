"""launch/slurm.sbatch: its logic with stand-ins for srun, and whole jobs on a SLURM of two virtual nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.text.test_tokenize import digest
from tests.project.test_launch import ROOT, installed_here, stand_in
from tests.support import slurm_cluster
from tests.support.slurm_cluster import Cluster

__all__ = ["stand_in"]

SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$MASTER_ADDR:$MASTER_PORT" "$@" '-=-' >> "{place}/srun"
code="$(head -n 1 "{place}/codes")"
sed -i 1d "{place}/codes"
if [ "$code" = wait ]; then
    trap 'exit 138' USR1
    touch "{place}/waiting"
    for _ in $(seq 300); do sleep 0.1; done
fi
exit "$code"
"""
SCONTROL = '#!/bin/sh\n[ "$1" = show ] && echo node1 && echo node2 && exit 0\necho "$@" >> "{place}/scontrol"\n'
RUN = [
    "shakespeare-char", "--data.path", "text.txt", "--data.cache", "cache", "--train.steps", "600", "--log.every", "1",
    "--eval.every", "0", "--save.every", "0", "--sample.tokens", "4", "--model.width", "32", "--model.heads", "2", "--model.depth", "2",
    "--data.sequence-length", "32", "--layer.precision", "fp32", "--layer.compile", "eager",
]  # fmt: skip


class Job:
    """The job script without SLURM: srun ends with the given codes; `wait` waits for SIGUSR1."""

    def __init__(self, place: Path, environment: Path, *codes: str) -> None:
        self.place, self.environment = place, environment
        (place / "codes").write_text("".join(f"{code}\n" for code in codes), encoding="utf-8")
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (place / "bin").mkdir(exist_ok=True)
            (place / "bin" / name).write_text(text.replace("{place}", str(place)), encoding="utf-8")
            (place / "bin" / name).chmod(0o755)

    def start(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        known = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))}
        job = {"SLURM_JOB_ID": "20007", "SLURM_JOB_NAME": "gptoughts", "SLURM_JOB_NODELIST": "node[1-2]",
               "SLURM_SUBMIT_DIR": str(ROOT), "VIRTUAL_ENV": str(self.environment),
               "PATH": f"{self.place}/bin:{os.environ['PATH']}"}  # fmt: skip
        script = ["bash", str(ROOT / "launch" / "slurm.sbatch"), *words]
        return subprocess.Popen(
            script, env={**known, **job, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def steps(self) -> list[list[str]]:
        """The words of every srun; the first is where the ranks meet."""
        text = (self.place / "srun").read_text(encoding="utf-8")
        return [call.split("\n") for call in text.removesuffix("\n-=-\n").split("\n-=-\n")]

    def requeued(self) -> str:
        path = self.place / "scontrol"
        return path.read_text(encoding="utf-8") if path.exists() else ""


def test_one_rank_per_task_with_a_name_of_the_job(stand_in: Path, tmp_path: Path) -> None:
    (tmp_path / "my env").write_text("export MASTER_ADDR=from-env-file\n", encoding="utf-8")
    job = Job(tmp_path, stand_in, "0", "0")
    process = job.start("gpt-1b", "--train.steps", "3", SLURM_NTASKS_PER_NODE="8", SLURM_GPUS_ON_NODE="8")
    _, wrong = process.communicate(timeout=60)
    assert process.returncode == 0, wrong
    process = job.start("--env", str(tmp_path / "my env"), "gpt-1b", "--name", "a b")
    assert process.wait(60) == 0
    first, second = job.steps()
    train = [str(stand_in / "bin" / "python"), "-m", "gptoughts", "train", "gpt-1b"]
    name = ["--train.steps", "3", "--name", "gptoughts_20007"]
    assert first == ["node1:20007", "--wait=60", "--ntasks-per-node", "8", *train, *name]
    assert second == ["from-env-file:20007", "--wait=60", "--ntasks-per-node", "1", *train, "--name", "a b"]
    assert job.requeued() == ""


def test_a_signal_saves_and_requeues(stand_in: Path, tmp_path: Path) -> None:
    job = Job(tmp_path, stand_in, "wait")
    process = job.start("gpt-1b")
    while not (tmp_path / "waiting").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    said, wrong = process.communicate(timeout=60)
    assert process.returncode == 138, wrong
    assert job.requeued() == "requeue 20007\n"
    assert "requeueing job 20007" in said


def test_out_of_memory_starts_the_ranks_again_and_other_errors_do_not(stand_in: Path, tmp_path: Path) -> None:
    job = Job(tmp_path, stand_in, "75", "75", "3")
    process = job.start("gpt-1b")
    _, wrong = process.communicate(timeout=60)
    assert process.returncode == 3
    assert wrong.count("smaller micro-batch") == 2
    assert len(job.steps()) == 3
    assert job.requeued() == ""


def test_bad_input_is_one_message(stand_in: Path, tmp_path: Path) -> None:
    job = Job(tmp_path, stand_in)
    for variables, expected in (
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS_PER_NODE": "1"}, "4 GPUs and 1 tasks per node; needs one task per GPU"),
        ({"SLURM_SUBMIT_DIR": str(tmp_path)}, f"{tmp_path}: not the root of the checkout"),
    ):
        process = job.start("gpt-1b", **variables)
        _, wrong = process.communicate(timeout=60)
        assert process.returncode == 2
        assert wrong.startswith("error: ") and expected in wrong
    assert not (tmp_path / "srun").exists()


# --- whole jobs


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = slurm_cluster.missing()
    if reason:
        pytest.skip(f"no SLURM: {reason}")
    if sys.prefix == sys.base_prefix or not installed_here(ROOT):
        pytest.skip("this checkout is not installed in a virtual environment with its train extra")
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm") / "cluster") as started:
        yield started


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder to submit from: the scripts of this checkout, a text, and an empty logs/."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "logs").mkdir()
    (tmp_path / "text.txt").write_text("".join(f"line {number} of a text\n" for number in range(600)), encoding="utf-8")
    return tmp_path


def losses(checkout: Path, name: str) -> dict[int, float]:
    path = checkout / "out" / name / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def output(checkout: Path, number: str) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted((checkout / "logs").glob(f"*_{number}.*")))


@pytest.mark.slow
def test_a_job_is_signalled_saved_requeued_and_equals_an_unbroken_one(cluster: Cluster, checkout: Path) -> None:
    settings = {"VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    two_nodes = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--job-name=broken", "launch/slurm.sbatch"]
    broken = cluster.submit(*two_nodes, *RUN, "--name", "broken", cwd=checkout, **settings)
    deadline = time.monotonic() + 300
    while len(losses(checkout, "broken")) < 2 and time.monotonic() < deadline:
        assert cluster.job(broken)["JobState"] in ("PENDING", "RUNNING"), output(checkout, broken)
        time.sleep(0.1)
    cluster.run("scancel", "--batch", "--signal=USR1", broken)  # as --signal=B:USR1@120 does
    job = cluster.wait(broken, 600)
    said = output(checkout, broken)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), said
    assert said.count("start 1, nodes n[1-2]") == 1 and said.count("start 2, nodes n[1-2]") == 1
    assert "interrupted at step" in said and f"the ranks ended with code 138; requeueing job {broken}" in said
    assert "step-000600" in said
    launch = [sys.executable, "-m", "gptoughts", "launch", "slurm", *RUN, "--name", "whole", "--gpus-per-node", "2"]
    written = cluster.run(*launch, cwd=checkout, PYTHONPATH=str(ROOT))
    assert written.returncode == 0, written.stderr
    assert written.stdout.splitlines()[-1] == "next        sbatch logs/whole.sbatch"
    whole = cluster.submit("logs/whole.sbatch", cwd=checkout, PYTHONPATH=str(ROOT), **settings)
    assert cluster.wait(whole, 600)["JobState"] == "COMPLETED", output(checkout, whole)
    assert (checkout / "logs" / f"whole_{whole}.out").is_file() and (checkout / "logs" / f"broken_{broken}.err").is_file()
    assert len(losses(checkout, "whole")) == 600
    assert losses(checkout, "broken") == losses(checkout, "whole")


@pytest.mark.slow
def test_tasks_of_srun_tokenize_together(cluster: Cluster, checkout: Path) -> None:
    words = [sys.executable, "-m", "gptoughts", "tokenize", "text.txt", "--tokenizer", "chars", "--val-fraction", "0.1", "--to"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    alone = subprocess.run(
        [*words, "alone"], cwd=checkout, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert alone.returncode == 0, alone.stderr
    together = cluster.run("srun", "--nodes=2", "--ntasks=4", *words, "together", cwd=checkout, **environment)
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("next       gptoughts train RECIPE") == 1, together.stdout
    assert digest(checkout / "together") == digest(checkout / "alone")


@pytest.mark.slow
def test_gpus_without_tasks_are_refused(cluster: Cluster, checkout: Path) -> None:
    number = cluster.submit("--gpus-per-node=2", "launch/slurm.sbatch", *RUN, cwd=checkout, VIRTUAL_ENV=sys.prefix)
    job = cluster.wait(number, 60)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0")
    assert "2 GPUs and 1 tasks per node" in output(checkout, number)
