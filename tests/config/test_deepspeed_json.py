"""`--deepspeed FILE` is answered key by key with flags that exist, whatever the file holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoughts.cli.main import main
from gptoughts.config.deepspeed_json import ANSWERS, TABLES, refusal
from gptoughts.errors import ConfigError
from gptoughts.layers import CATALOG
from tests.support.golden_files import ROOT

TYPICAL = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 1.0,
    "steps_per_print": 10,
    "seed": 7,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 5, "total_num_steps": 50}},
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu"},
        "reduce_bucket_size": 2**20,
        "stage3_prefetch_bucket_size": 1,
        "round_robin_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "activation_checkpointing": {"cpu_checkpointing": True},
}


def answer(folder: Path, config: object) -> tuple[list[str], str]:
    """The lines about keys, and the proposed command."""
    path = folder / "ds.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    lines = str(refusal(path)).splitlines()
    assert lines[0].endswith(f"Found {path}")
    return [line.strip() for line in lines[1:-1]], lines[-1].strip().removeprefix("Try: ")


def test_each_key_has_a_line_and_flags_become_a_command(tmp_path: Path) -> None:
    lines, command = answer(tmp_path, TYPICAL)
    assert "zero_optimization.stage = 3: --layer.parallel zero3" in lines
    assert "optimizer.params.betas = [0.9, 0.95]: --optim.beta1 0.9 --optim.beta2 0.95" in lines
    assert 'gradient_accumulation_steps = "auto": the recipe\'s value' in lines
    assert "zero_optimization.round_robin_gradients = true: no equivalent" in lines
    assert "zero_optimization.stage3_prefetch_bucket_size = 1: set by the layer from the model's sizes" in lines
    assert command.startswith("gptoughts plan RECIPE --train.global-batch 32 --layer.microbatch fixed")
    assert "--layer.parallel.offload-weights true --layer.parallel.bucket-mb 4" in command
    assert "recompute" not in command, "a table of settings switches nothing on"


def test_the_command_line_ends_with_it_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(TYPICAL), encoding="utf-8")
    for words in (["--deepspeed", str(tmp_path / "ds.json")], [f"--deepspeed_config={tmp_path / 'ds.json'}"]):
        with pytest.raises(SystemExit) as left:
            main(["train", "quickstart", *words])
        told = capsys.readouterr()
        assert left.value.code == 2
        assert told.err.startswith("error: --deepspeed: a recipe and flags configure a run") and told.out == ""
    with pytest.raises(SystemExit):
        main(["train", "quickstart", "--deepspeed"])
    assert "Try: --layer.parallel zero1, zero2 or zero3" in capsys.readouterr().err


def test_the_proposed_command_is_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zero = {**TYPICAL["zero_optimization"], "stage": 0}  # type: ignore[dict-item]
    _, command = answer(tmp_path, {**TYPICAL, "zero_optimization": zero})
    with pytest.raises(SystemExit) as left:
        main([*command.replace("RECIPE", "quickstart").split()[1:], "--ranks", "2"])
    assert left.value.code == 0 and "parallel           ddp (bucket_mb=4," in capsys.readouterr().out


def test_every_flag_of_the_answers_exists() -> None:
    known = set(re.findall(r"^gptoughts train (--[a-z0-9.-]+)", (ROOT / "tests/golden/flags.txt").read_text(), re.M))
    samples = (1, 0, True, "cpu", "adamw", "lion", "WarmupLR", [0.9, 0.99])
    texts = [one if isinstance(one, str) else one(value) for one in ANSWERS.values() for value in samples]
    mentioned = {flag for text in (*texts, *TABLES.values()) for flag in re.findall(r"--[a-z][a-z0-9.-]+[a-z0-9]", text)}
    assert len(mentioned) > 20 and mentioned <= known


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_options_are_proposed_only_for_layers_that_have_them(tmp_path: Path, stage: int) -> None:
    device = {"device": "cpu"}
    zero = {"stage": stage, "offload_optimizer": device, "offload_param": device, "reduce_bucket_size": 1e8}
    _, command = answer(tmp_path, {"zero_optimization": zero})
    layer = re.search(r"--layer\.parallel (\w+)", command)
    assert layer is not None
    given_options = re.findall(r"--layer\.parallel\.([a-z-]+) (\w+)", command)
    options = {name.replace("-", "_"): value for name, value in given_options}
    assert CATALOG[layer[1]].read_options(options, "the test")["bucket_mb"] == 381
    assert len(options) == {0: 1, 1: 2, 2: 2, 3: 3}[stage]


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["auto", "cpu", "nvme"])
)
NAMES = st.sampled_from(sorted({part for key in (*ANSWERS, *TABLES) for part in key.split(".")})) | st.text(max_size=4)
VALUES: Any = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=12
)


@given(st.dictionaries(NAMES, VALUES, min_size=1, max_size=6))
def test_any_configuration_is_one_message(tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> None:
    lines, command = answer(tmp_path_factory.mktemp("any"), config)
    assert len(lines) >= len(config) and command.startswith("gptoughts plan RECIPE")
    assert all(line.isprintable() for line in (*lines, command))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "not a DeepSpeed configuration. Found list"),
        ("{", "not a JSON file"),
        ("\xff", "not a JSON file"),
        ('{"a":' * 100_000, "not a JSON file"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested too deeply"),
        ('{"a":' * 90 + "1" + "}" * 90, "no equivalent"),
        ('{"zero_optimization": {"reduce_bucket_size": 1e999, "stage": [3]}}', "stages are 0 to 3"),
        ('{"optimizer": {"type": "\\u001b[2J"}}', 'there is no "\\u001b[2J"'),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text, encoding="latin-1")
    try:
        found = refusal(path)
    except ConfigError as error:
        found = error
    assert said in str(found)
    with pytest.raises(ConfigError, match="No such file"):
        refusal(tmp_path / "none.json")
