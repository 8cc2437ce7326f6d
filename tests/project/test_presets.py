"""The presets launch/train_*.sh: what they plan on three machines, the command they print, and two trainings for real."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from tests.project.test_doc_commands import check
from tests.project.test_launch import ROOT, TINY, calls, installed_here, run, stand_in

__all__ = ["stand_in"]

MACHINES = {"cpu": 1, "rtx4090": 1, "h100x8": 8}
"""Fake machines and their ranks."""
PRESETS = {
    "train_optimized": [],
    "train_max_gpu": ["--layer.microbatch", "auto"],
    "train_deepseek_optimized": ["deepseek-small", "--layer.microbatch", "auto"],
    "train_deepseek_stable": ["deepseek-small", "--profile", "stable"],
}
"""Words of the command that each preset ends in."""
SMALL = ["--model.width", "32", "--train.steps", "3"]


def dry_run(preset: str, machine: str, *words: str) -> str:
    if sys.prefix == sys.base_prefix or not installed_here(ROOT):
        pytest.skip("this checkout is not installed in a virtual environment with its train extra")
    file = str(ROOT / "tests" / "machines" / f"{machine}.json")
    done = run(f"launch/{preset}.sh", *words, "--dry-run", "--machine", file, VIRTUAL_ENV=sys.prefix)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "machine", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("rtx4090", marks=pytest.mark.slow), "h100x8"]
)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_dry_run_prints_plan_and_command(preset: str, machine: str) -> None:
    said = dry_run(preset, machine, "--name", "two words")
    ranks = MACHINES[machine]
    assert f", {ranks} rank" in said or (ranks == 1 and ", 1 process" in said)
    assert ("\nparallel           single" in said) == (ranks == 1)
    command = said.splitlines()[-1]
    assert command.startswith("command     gptoughts train")
    words = shlex.split(command)[2:]
    assert words[-2:] == ["--name", "two words"]
    for word in PRESETS[preset]:
        assert word in words
    check([word for word in words if word not in ("--name", "two words")])
    assert ("microbatch         auto" in said) == ("auto" in PRESETS[preset])
    if preset == "train_deepseek_stable":
        assert "not bit-identical" not in said
        for line in (
            "attention          math",
            "precision          fp32",
            "matmul             ieee",
            "compile            eager",
        ):
            assert line in said
    elif machine == "h100x8":
        assert "precision          bf16" in said and "attention          sdpa" in said


@pytest.mark.parametrize("preset", PRESETS)
def test_arguments_reach_train(preset: str, stand_in: Path, tmp_path: Path) -> None:
    done = run(f"launch/{preset}.sh", "gpt2-124m", *SMALL, "--name", "a b", "--strict", cwd=tmp_path, VIRTUAL_ENV=str(stand_in))
    assert done.returncode == 0, done.stderr
    words = calls(stand_in)[-1][1:]
    assert words[:4] == ["-m", "gptoughts", "train", "gpt2-124m"]
    assert words[-7:] == [*SMALL, "--name", "a b", "--strict"]
    assert words.count("gpt2-124m") == 1 and "deepseek-small" not in words


def test_a_dry_run_leaves_options_of_training_out_of_the_plan(stand_in: Path) -> None:
    words = ["--dry-run", *SMALL, "--name", "x", "--resume=never", "--ranks", "4", "--strict", "--run-dir", "y"]
    done = run("launch/train_max_gpu.sh", *words, VIRTUAL_ENV=str(stand_in))
    assert done.returncode == 0, done.stderr
    plan = ["-m", "gptoughts", "plan", "--profile", "auto", "--layer.microbatch", "auto", *SMALL, "--ranks", "4"]
    assert calls(stand_in)[-1][1:] == plan
    assert done.stdout.splitlines()[-1].endswith("--name x --resume=never --ranks 4 --strict --run-dir y")


def test_a_machine_file_is_only_for_a_dry_run(stand_in: Path) -> None:
    done = run("launch/train_optimized.sh", "--machine", "x.json", VIRTUAL_ENV=str(stand_in))
    assert done.returncode == 2
    assert done.stderr == "error: --machine x.json: only with --dry-run; training uses this machine\n"


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["train_max_gpu", "train_deepseek_stable"])
def test_a_preset_trains(preset: str, tmp_path: Path) -> None:
    """The micro-batch that was found, and the exact layers, in a real run."""
    if sys.prefix == sys.base_prefix or not installed_here(ROOT):
        pytest.skip("this checkout is not installed in a virtual environment with its train extra")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400, encoding="utf-8")
    sizes = {key: value for key, value in TINY.items() if not key.startswith("model.") or preset == "train_max_gpu"}
    if preset == "train_deepseek_stable":
        config = json.loads((ROOT / "gptoughts" / "recipes" / "configs" / "deepseek-small.json").read_text(encoding="utf-8"))
        tiny = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 2,
                "vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256,
                "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8, "v_head_dim": 8}  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps({**config, **tiny}), encoding="utf-8")
        sizes["model.config"] = str(tmp_path / "config.json")
    flags = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    place = ["--data.path", str(text), "--data.cache", str(tmp_path / "cache"), "--run-dir", str(tmp_path / "run")]
    done = run(f"launch/{preset}.sh", *flags, *place, VIRTUAL_ENV=sys.prefix, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    plan = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    assert plan["not_repeatable"] == []
    evidence = json.loads((tmp_path / "run" / "evidence.json").read_text(encoding="utf-8"))["layers"]
    assert {line["status"] for line in evidence} == {"active"}
    assert plan["profile"] == ("stable" if preset == "train_deepseek_stable" else "cpu")
