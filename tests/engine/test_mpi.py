"""Collectives over MPI equal gloo's, DDP and FSDP2 train the same over them, and a rank that fails ends all. Needs OpenMPI."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptoughts.engine.distributed.mpi_group import overlap, return_to
from gptoughts.engine.distributed.mpi_worker import MPIWork, Worker

ROOT = Path(__file__).parents[2]
INSTALL = "apt-get install openmpi-bin libopenmpi-dev"


def mpirun(ranks: int, *words: str, cwd: Path = ROOT, timeout: int = 400) -> subprocess.CompletedProcess[str]:
    """Start Python on some ranks. Skips the test where OpenMPI or mpi4py is missing."""
    program = shutil.which("mpirun")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout if program else ""
    if "Open MPI" not in version:
        pytest.skip(f"no mpirun of OpenMPI on this machine: {INSTALL}")
    pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install 'gptoughts[mpi]'")
    command = [str(program), "--allow-run-as-root", "--oversubscribe", "-np", str(ranks), sys.executable, *words]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=timeout)


@pytest.mark.slow
def test_ranks_of_mpich_train_as_one_process(tmp_path: Path) -> None:
    """MPICH names its ranks in other variables; gradients travel over gloo."""
    program = shutil.which("mpirun.mpich") or shutil.which("mpiexec.hydra")
    if program is None:
        pytest.skip("no mpirun of MPICH on this machine: apt-get install mpich")
    (tmp_path / "text.txt").write_text("".join(f"line {number} of a text\n" for number in range(480)), encoding="utf-8")
    flags = [
        "--data.path", "text.txt", "--data.cache", "cache", "--train.steps", "3", "--log.every", "1", "--eval.every", "0", "--eval.batches", "1",
        "--sample.tokens", "4", "--model.width", "32", "--model.heads", "2", "--model.depth", "2", "--data.sequence-length", "32",
        "--layer.precision", "fp32", "--layer.compile", "eager", "--numerics", "off",
    ]  # fmt: skip
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    losses = {}
    for ranks in (1, 2):
        start = [program, "-np", "2"] if ranks == 2 else []
        words = [sys.executable, "-m", "gptoughts", "train", "shakespeare-char", *flags, "--run-dir", f"run{ranks}"]
        ran = subprocess.run(
            [*start, *words], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False, timeout=300
        )
        assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
        rows = [json.loads(line) for line in (tmp_path / f"run{ranks}" / "metrics.jsonl").read_text().splitlines()]
        losses[ranks] = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses[1]) == 3
    assert losses[2] == pytest.approx(losses[1], abs=1e-5)
    plan = json.loads((tmp_path / "run2" / "plan.json").read_text())
    assert plan["world_size"] == 2


# --- without MPI


def explained(prepare: str, **environment: str) -> str:
    """Return the error of `require_mpi` in a process of an MPI launcher, with Python lines before it."""
    code = (
        f"import os, sys\n{prepare}\nfrom gptoughts.engine.distributed.mpi_library import require_mpi\n"
        "from gptoughts.errors import ConfigError\nfrom gptoughts.hardware.world import World\n"
        "try:\n    require_mpi(World(0, 0, 2, 2, 'openmpi'), os.environ)\n"
        "except ConfigError as error:\n    print(error)\nassert 'torch' not in sys.modules\n"
    )
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    ran = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    return ran.stdout


def test_a_missing_package_or_library_is_named_with_the_command_that_installs_it() -> None:
    missing = explained("sys.modules['mpi4py'] = None", OMPI_COMM_WORLD_RANK="0")
    assert missing == "--collectives mpi: package not installed: mpi4py.\n  Try: pip install 'gptoughts[mpi]'\n"
    pytest.importorskip("mpi4py", reason="mpi4py is not installed: pip install 'gptoughts[mpi]'")
    broken = explained("", PMI_RANK="0", MPI4PY_LIBMPI="/no/such/libmpi.so")
    if broken:  # builds of mpi4py for one library do not read the variable
        assert broken.startswith("--collectives mpi: mpi4py cannot load the MPI library. Found ")
        assert "/no/such/libmpi.so" in broken and "Try: apt-get install" in broken


def test_jobs_run_in_order_and_their_errors_reach_the_one_who_waits() -> None:
    worker, done = Worker(), []
    works = [MPIWork(worker.run(lambda number=number: done.append(number))) for number in range(50)]
    assert works[-1].wait() and done == list(range(50)) and all(work.is_completed() for work in works)
    with pytest.raises(ZeroDivisionError):
        MPIWork(worker.run(lambda: 1 // 0)).wait()
    assert worker.run(lambda: "goes on").wait() == "goes on"
    worker.close()


def test_shared_memory_is_noticed_and_copies_come_back() -> None:
    whole = torch.arange(10.0)
    assert overlap(whole, whole[3:5]) and not overlap(whole[:5], whole[5:])
    target = torch.zeros(4, 2, dtype=torch.bfloat16)[:, 0]
    return_to(target, torch.arange(4.0))
    assert target.tolist() == [0, 1, 2, 3]


# --- two ranks


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the prefix of what two ranks wrote, from one launch."""
    out = tmp_path_factory.mktemp("mpi") / "two"
    ran = mpirun(2, "-m", "tests.support.mpi_worker", "all", str(out))
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    return out


def read(place: Path, name: str = "") -> dict[str, Any]:
    value: dict[str, Any] = json.loads(Path(f"{place}{name}.json").read_text(encoding="utf-8"))
    return value


@pytest.mark.slow
def test_collectives_equal_gloo_for_drawn_shapes_and_types(place: Path) -> None:
    record = read(place)
    assert record["backends"] == ["mpi4py", "gloo"]
    assert len(record["worst"]) == 120
    assert {name: worst for name, worst in record["worst"].items() if worst > 0} == {}
    assert record["asynchronous"] and record["refused"] == "refused" and record["again"] == 2.0


@pytest.mark.slow
def test_ddp_over_mpi_equals_gloo_and_one_process(place: Path) -> None:
    ours, gloo, single = (read(place, f"-{name}") for name in ("mpi", "gloo", "single"))
    assert ours["losses"] == pytest.approx(gloo["losses"], abs=1e-6)
    assert ours["losses"] == pytest.approx(single["losses"], abs=1e-6)
    assert ours["proof"][0] and ours["negative"]
    assert ", 0 exchanges" not in ours["proof"][1], "the profiler does not see collectives over MPI"
    weights = [load_file(f"{place}-{name}.safetensors") for name in ("mpi", "single")]
    assert all((weights[0][name] - value).abs().max() < 1e-5 for name, value in weights[1].items())


@pytest.mark.slow
def test_fsdp2_over_mpi_equals_gloo(place: Path) -> None:
    for dtype, (ours, gloo) in read(place)["sharded"].items():
        assert ours == pytest.approx(gloo, abs=1e-6), dtype
        assert ours[0] != ours[2]


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_ranks_that_wait_for_it() -> None:
    ran = mpirun(2, "-m", "tests.support.mpi_worker", "fail", "-", timeout=200)
    assert ran.returncode == 2, ran.stderr
    assert "rank 1: cannot continue" in ran.stderr and "waited for a rank that is gone" not in ran.stderr


@pytest.mark.slow
def test_a_world_that_is_not_that_of_mpi_is_refused_with_both_values() -> None:
    ran = mpirun(1, "-m", "tests.support.mpi_worker", "contradict", "-", timeout=200)
    assert ran.returncode == 2
    assert "Found rank 0 of 2 (torchrun), and rank 0 of 1 in MPI.COMM_WORLD" in ran.stderr


# --- four ranks


@pytest.mark.slow
def test_four_ranks_train_a_character_model_for_an_epoch_and_one_process_generates(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {number} of a text that repeats\n" for number in range(480)), encoding="utf-8")
    flags = [
        "--data.path", str(text), "--data.cache", str(tmp_path / "cache"), "--run-dir", str(tmp_path / "run"),
        "--model.depth", "4", "--model.heads", "4", "--model.width", "128", "--data.sequence-length", "128",
        "--train.global-batch", "32", "--optim.learning-rate", "3e-4", "--train.epochs", "1", "--log.every", "1",
        "--eval.every", "0", "--eval.batches", "1", "--sample.tokens", "4", "--layer.precision", "fp32", "--numerics", "off",
    ]  # fmt: skip
    ran = mpirun(4, "-m", "gptoughts", "train", "shakespeare-char", *flags, "--collectives", "mpi", cwd=tmp_path, timeout=550)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    evidence = json.loads((tmp_path / "run" / "evidence.json").read_text())
    assert next(line for line in evidence["layers"] if line["layer"] == "ddp")["status"] == "active"
    tokens = len(text.read_text(encoding="utf-8")) * 0.95  # the rest is the validation split
    assert len(losses) == pytest.approx(tokens / (32 * 128), abs=1) and losses[-1] < losses[0]
    words = ["generate", str(tmp_path / "run"), "--prompt", "line", "--tokens", "8", "--temperature", "0.9", "--top-k", "40"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "gptoughts", *words]
    wrote = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert wrote.returncode == 0 and wrote.stdout.startswith("line"), wrote.stdout + wrote.stderr
