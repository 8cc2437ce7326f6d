"""Two gloo ranks are one process: equal losses and weights on ragged labels, a proof, and a whole run under torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.ddp_worker import FAMILIES

ROOT = Path(__file__).parents[2]


def launch(ranks: int, *words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a module alone or under torchrun, which on one box meets over loopback."""
    import os

    alone = [sys.executable, *words]
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *words]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    command = alone if ranks == 1 else together
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=300)


DEFAULT, *OTHERS = FAMILIES
TIERS = [DEFAULT, *(pytest.param(family, marks=pytest.mark.slow) for family in OTHERS)]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return what trains a family in one process and in two ranks, once: the default tier's alone, the others together."""

    @cache
    def trained(families: tuple[str, ...]) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("ddp")
        for ranks in (1, 2):
            ran = launch(ranks, "-m", "tests.support.ddp_worker", str(folder / f"ranks{ranks}"), *families)
            assert ran.returncode == 0, ran.stderr[-3000:]
        return folder / "ranks1", folder / "ranks2"

    return lambda family: trained((DEFAULT,) if family == DEFAULT else tuple(OTHERS))


@pytest.fixture
def both(places: Callable[[str], tuple[Path, Path]], family: str) -> tuple[Path, Path]:
    return places(family)


@pytest.mark.parametrize("family", TIERS)
def test_losses_and_weights_equal_one_process_on_ragged_labels(both: tuple[Path, Path], family: str) -> None:
    one, two = (json.loads(path.with_name(f"{path.name}-{family}.json").read_text()) for path in both)
    assert one["losses"] == pytest.approx(two["losses"], abs=1e-6)
    ours, theirs = (load_file(path.with_name(f"{path.name}-{family}.safetensors")) for path in both)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert (weight - theirs[name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("family", TIERS)
def test_the_proof_sees_equal_ranks_and_notices_one_that_differs(both: tuple[Path, Path], family: str) -> None:
    record = json.loads(both[1].with_name(f"{both[1].name}-{family}.json").read_text())
    assert record["proof"][0], record["proof"][1]
    assert "2 ranks hold equal weights" in record["proof"][1]
    assert record["negative"]


@pytest.mark.slow
def test_a_run_under_torchrun_equals_a_run_alone(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        "".join(f"line {number} of a text that repeats itself a little\n" for number in range(400)), encoding="utf-8"
    )
    flags = [
        "-m", "gptoughts", "train", "shakespeare-char",
        "--train.steps", "4",
        "--log.every", "1",
        "--eval.every", "0",
        "--eval.batches", "2",
        "--sample.tokens", "4",
        "--model.width", "32",
        "--model.heads", "2",
        "--model.depth", "2",
        "--data.sequence-length", "32",
        "--layer.precision", "fp32",
    ]  # fmt: skip
    rows = {}
    for ranks in (1, 2):
        place = tmp_path / f"run{ranks}"
        ran = launch(
            ranks,
            *flags,
            "--data.path",
            str(text),
            "--data.cache",
            str(tmp_path / "cache"),
            "--run-dir",
            str(place),
            cwd=tmp_path,
        )
        assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
        lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        rows[ranks] = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
        assert (place / "checkpoints" / "latest").read_text().strip() == "step-000004"
    assert rows[1].keys() == rows[2].keys() == {1, 2, 3, 4}
    for step, loss in rows[1].items():
        assert rows[2][step] == pytest.approx(loss, abs=2e-5)
    evidence = json.loads((tmp_path / "run2" / "evidence.json").read_text())
    assert next(line for line in evidence["layers"] if line["layer"] == "ddp")["status"] == "active"


@pytest.mark.slow
def test_a_signal_ends_all_ranks_at_one_step_with_a_checkpoint(tmp_path: Path) -> None:
    """SIGTERM to the launcher reaches the ranks; they agree, save and leave, and the run goes on from there."""
    import os
    import signal
    import time

    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {number} of a text\n" for number in range(600)), encoding="utf-8")
    words = [
        "-m", "gptoughts", "train", "shakespeare-char", "--data.path", str(text), "--data.cache", str(tmp_path / "cache"),
        "--train.steps", "4000", "--log.every", "1", "--eval.every", "0", "--save.every", "0", "--sample.tokens", "4",
        "--model.width", "32", "--model.heads", "2", "--model.depth", "2", "--data.sequence-length", "32", "--run-dir", str(tmp_path / "run"),
    ]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while (
        process.poll() is None
        and time.monotonic() < deadline
        and (not metrics.exists() or metrics.read_text().count("\n") < 20)
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert "checkpoint saved. Resume with" in said, said[-3000:]
    latest = (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
    reached = int(latest.removeprefix("step-"))
    assert f"interrupted at step {reached}, checkpoint saved" in said
    losses = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert max(row["step"] for row in losses) == reached
    assert not any("eval/loss" in row for row in losses), "validation delayed the checkpoint"
