"""A checkpoint of sharded ranks goes on with any number of ranks and any strategy: the same samples, the same losses."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from gptoughts.engine.checkpoint import integrity
from gptoughts.engine.checkpoint.parts import TensorFiles
from gptoughts.inference.load import load

ROOT = Path(__file__).parents[2]
STEPS, SAVED = 8, 4
Train = Callable[..., Path]
STRATEGIES = {
    "hybrid": {"layer.parallel": "fsdp2", "layer.parallel.replicas": 2},
    "zero3": {"layer.parallel": "zero3", "layer.compile": "eager"},
}
"""Flags of the strategies that are more than a layer's name."""


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return what trains a tiny model of 101 tokens, which no number of ranks divides, and gives the run's folder."""
    base = tmp_path_factory.mktemp("worlds")
    text = base / "text.txt"
    text.write_text("".join(f"line {number} of a text that repeats itself\n" for number in range(900)), encoding="utf-8")

    @cache
    def run(name: str, ranks: int, strategy: str, resume: Path | None = None, steps: int = STEPS, dropout: float = 0.0) -> Path:
        flags = {
            "data.path": text, "data.cache": base / "cache", "train.steps": steps, "train.global-batch": 12, "log.every": 1, "eval.every": 0,
            "eval.batches": 2, "save.every": 1, "save.keep": 9, "sample.tokens": 4, "model.vocab-size": 101, "model.width": 32,
            "model.heads": 2, "model.depth": 2, "model.bias": "true", "model.dropout": dropout, "data.sequence-length": 32, "layer.precision": "fp32",
            **STRATEGIES.get(strategy, {"layer.parallel": strategy}), "layer.microbatch": "fixed", "layer.microbatch.sequences": 1,
            "run-dir": base / name, "numerics": "off", **({"resume": resume} if resume else {}),
        }  # fmt: skip
        words = ["-m", "gptoughts", "train", "shakespeare-char"]
        words += [part for key, value in flags.items() for part in (f"--{key}", str(value))]
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *words] if ranks == 1 else [*start, *words]
        ran = subprocess.run(command, cwd=base, env=variables, capture_output=True, text=True, check=False, timeout=600)
        assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
        return base / name

    return run


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def saved(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def hashes(run: Path, step: int) -> dict[str, str]:
    folder = saved(run, step)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.slow
def test_each_rank_writes_its_part_and_all_losses_equal_one_process(train: Train) -> None:
    alone, sharded = train("alone", 1, "single"), train("two", 2, "fsdp2")
    assert losses(alone).keys() == losses(sharded).keys() == set(range(1, STEPS + 1))
    for step, loss in losses(alone).items():
        assert losses(sharded)[step] == pytest.approx(loss, abs=1e-5)
    folder = saved(sharded, SAVED)
    assert integrity.damage(folder) == ""
    sizes = [path.stat().st_size for path in sorted(folder.glob("model-*"))]
    assert len(sizes) == 2
    assert max(sizes) < 0.6 * saved(alone, SAVED).joinpath("model.safetensors").stat().st_size
    ours, theirs = TensorFiles(folder, "model"), TensorFiles(saved(alone, SAVED), "model")
    assert set(ours.names()) == set(theirs.names())
    for name in theirs.names():
        assert (ours.tensor(name) - theirs.tensor(name)).abs().max() < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "strategy"), [(1, "single"), (2, "ddp"), (4, "fsdp2"), (3, "zero3")])
def test_another_world_continues_with_the_same_samples(train: Train, ranks: int, strategy: str) -> None:
    unbroken = losses(train("two", 2, "fsdp2"))
    resumed = train(f"from-{strategy}-{ranks}", ranks, strategy, saved(train("two", 2, "fsdp2"), SAVED))
    later = losses(resumed)
    assert later.keys() == set(range(SAVED + 1, STEPS + 1))
    for step, loss in later.items():
        assert loss == pytest.approx(unbroken[step], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "ddp", "zero2", "zero3"])
def test_the_same_world_continues_bit_for_bit_with_dropout(train: Train, strategy: str) -> None:
    unbroken = train(f"dropout-{strategy}", 2, strategy, dropout=0.1)
    resumed = train(f"dropout-{strategy}-again", 2, strategy, saved(unbroken, SAVED), dropout=0.1)
    before = {step: loss for step, loss in losses(unbroken).items() if step > SAVED}
    assert {step: loss.hex() for step, loss in losses(resumed).items()} == {step: loss.hex() for step, loss in before.items()}
    assert hashes(resumed, STEPS) == hashes(unbroken, STEPS)


@pytest.mark.slow
def test_a_checkpoint_survives_several_worlds(train: Train) -> None:
    """Two ranks save, three load and save at once, one loads and finishes."""
    two = train("two", 2, "fsdp2")
    three = train("chain-3", 3, "fsdp2", saved(two, SAVED), steps=SAVED + 1)
    assert len(list(saved(three, SAVED + 1).glob("optimizer-*-of-00003.safetensors"))) == 3
    one = train("chain-1", 1, "single", saved(three, SAVED + 1))
    for step, loss in losses(one).items():
        assert loss == pytest.approx(losses(two)[step], abs=1e-5)


@pytest.mark.slow
def test_rank_0_checks_the_files_and_all_ranks_take_its_checkpoint(train: Train, tmp_path: Path) -> None:
    two = train("two", 2, "fsdp2")
    run = tmp_path / "run"
    shutil.copytree(two, run)
    part = saved(run, STEPS) / "model-00002-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"\0")
    saved_recipe = run / "recipe.toml"
    command = [
        sys.executable,
        "-m",
        "gptoughts",
        "train",
        str(saved_recipe),
        "--ranks",
        "2",
        "--layer.parallel",
        "fsdp2",
        "--numerics",
        "off",
    ]
    command += [
        "--layer.precision",
        "fp32",
        "--layer.microbatch",
        "fixed",
        "--layer.microbatch.sequences",
        "1",
        "--run-dir",
        str(run),
    ]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def ran(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *words], cwd=two.parent, env=variables, capture_output=True, text=True, check=False, timeout=300
        )

    refused = ran("--resume", "never")
    assert refused.returncode == 2
    assert refused.stderr.count("--resume never: would overwrite checkpoints") == 1, refused.stderr
    again = ran()
    assert again.returncode == 0, again.stderr[-3000:]
    damaged = f"{saved(run, STEPS)}: damaged, skipped: {part.name} has another SHA-256 than when written"
    assert again.stdout.count(damaged) == 1, again.stdout
    later = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in later if row.get("attempt") == 2 and "train/loss" in row] == [STEPS]
    assert losses(run)[STEPS] == pytest.approx(losses(two)[STEPS], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_a_checkpoint_of_zero_goes_on_in_replicas_of_shards_and_alone(train: Train, strategy: str) -> None:
    """Two ranks save; four load and save at once, sharded in two groups that replicate each other; one loads and finishes."""
    two = train(f"{strategy}-two", 2, strategy)
    for step, loss in losses(train("alone", 1, "single")).items():
        assert losses(two)[step] == pytest.approx(loss, abs=1e-5)
    four = train(f"{strategy}-four", 4, "hybrid", saved(two, SAVED), steps=SAVED + 1)
    one = train(f"{strategy}-one", 1, "single", saved(four, SAVED + 1))
    assert losses(one).keys() == set(range(SAVED + 2, STEPS + 1))
    for step, loss in losses(one).items():
        assert loss == pytest.approx(losses(two)[step], abs=1e-5)


@pytest.mark.slow
def test_a_sharded_checkpoint_is_loaded_for_generation_and_export(train: Train, tmp_path: Path) -> None:
    folder = saved(train("two", 2, "fsdp2"), STEPS)
    loaded = load(str(folder))
    files = TensorFiles(folder, "model")
    for name, parameter in loaded.model.named_parameters():
        assert (parameter.detach().float() - files.tensor(name)).abs().max() == 0, name
    words = [
        "-m",
        "gptoughts",
        "export",
        str(folder),
        "--to",
        str(tmp_path / "exported"),
        "--text",
        str(folder.parents[2] / "text.txt"),
    ]
    ran = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, cwd=ROOT, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_a_checkpoint_of_a_missing_rank_is_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "step-000001"
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    state = {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    listed = {"files": {"state.json": state, "model-00001-of-00002.safetensors": {"bytes": 1, "sha256": ""}}}
    (folder / "manifest.json").write_text(json.dumps(listed))
    assert integrity.damage(folder) == "model-00001-of-00002.safetensors is missing"
