"""Whole runs of other models with sharded weights equal one process: losses, validation, samples, the adapter's checkpoint."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gptoughts.config.loader import load
from gptoughts.engine.checkpoint.parts import TensorFiles
from tests.models.hf.hf_configs import write_config

ROOT = Path(__file__).parents[2]
RECIPE = """
name = "sharded"
{objective}

[model]
{model}
vocab_size = 128

[data]
path = "text.txt"
cache = "cache"
tokenizer = "chars"
sequence_length = 32

[optim]
learning_rate = 1e-3
warmup_steps = 0

[train]
steps = 6
global_batch = 8

[log]
every = 1

[eval]
every = 3
batches = 2

[save]
every = 3

[sample]
tokens = 4
{more}
"""
KINDS = {
    "lora": ('family = "hf"\nconfig = "llama"', "", '[adapter]\nkind = "lora"\nrank = 4'),
    "experts": ('family = "hf"\nconfig = "deepseek_v3"', "", ""),
    "llada": ('family = "llada"\nwidth = 32\ndepth = 2\nheads = 2', 'objective = "masked-diffusion"', ""),
}


def write(folder: Path, kind: str) -> Path:
    """Write recipe, text and config of a kind."""
    model, objective, more = KINDS[kind]
    for name in ("llama", "deepseek_v3"):
        model = model.replace(f'config = "{name}"', f'config = "{folder / name}"')
        write_config(folder / name, name)
    (folder / "text.txt").write_text("".join(f"line {number} of a text that repeats itself\n" for number in range(900)))
    path = folder / "mine.toml"
    path.write_text(RECIPE.format(model=model, objective=objective, more=more))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_the_recipes_are_valid(tmp_path: Path, kind: str) -> None:
    assert load(str(write(tmp_path, kind))).recipe.train.steps == 6


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sharded"), [*((kind, "fsdp2") for kind in KINDS), ("lora", "zero3"), ("experts", "zero2")])
def test_a_sharded_run_equals_one_process(tmp_path: Path, kind: str, sharded: str) -> None:
    recipe, rows, samples = write(tmp_path, kind), {}, {}
    for ranks, strategy in ((1, "single"), (2, sharded)):
        words = ["train", str(recipe), "--layer.precision", "fp32", "--numerics", "off", "--layer.parallel", strategy]
        words += ["--layer.compile", "eager"] if sharded == "zero3" else []
        words += ["--ranks", str(ranks), "--run-dir", str(tmp_path / strategy)]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "gptoughts", *words]
        ran = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False, timeout=600)
        assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
        lines = [json.loads(line) for line in (tmp_path / strategy / "metrics.jsonl").read_text().splitlines()]
        rows[strategy] = [row[key] for key in ("train/loss", "eval/loss") for row in lines if key in row]
        samples[strategy] = ran.stdout.rpartition("step 6  sample:")[2]
        samples[strategy] = re.split(r"\n(?:limit|memory|goodput) ", samples[strategy])[0]
    assert len(rows["single"]) == 8
    assert rows[sharded] == pytest.approx(rows["single"], abs=1e-5)
    assert samples[sharded] == samples["single"] != ""
    one, two = (TensorFiles(tmp_path / strategy / "checkpoints" / "step-000006", "model") for strategy in ("single", sharded))
    assert set(one.names()) == set(two.names())
    assert max((one.tensor(name) - two.tensor(name)).abs().max() for name in one.names()) < 1e-4
    assert all("lora" in name for name in two.names()) is (kind == "lora")
