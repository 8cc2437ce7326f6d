"""Whole runs of every kind of model: trained, killed and resumed to the same bits, exported, written with, stopped by patience."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gptoughts
from gptoughts.cli.main import main
from gptoughts.errors import CheckpointError, ConfigError
from gptoughts.inference.load import load
from gptoughts.run.tracking.jsonl import read
from tests.models.hf.hf_configs import write_config
from tests.support.tiers import slow_except

TEXT = "".join(f"line {number}: the quick brown fox jumps over {number % 7} lazy dogs\n" for number in range(400))
PLAIN = {"compile": "eager", "host": "system", "precision": "fp32"}
COMMON: dict[str, Any] = {
    "data.tokenizer": "bytes", "data.sequence_length": 32, "train.global_batch": 4, "optim.warmup_steps": 0, "eval.batches": 2,
    "sample.tokens": 4, "save.every": 3, "save.keep": 9, "log.every": 1,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llada": {
        "objective": "masked-diffusion", "model.family": "llada", "model.depth": 2, "model.width": 32, "model.heads": 2,
        "diffusion.steps": 2, "diffusion.crop": 0.5,
    },
    "llama": {"model.config": "llama"},
    "mixture": {"model.config": "deepseek_v3", "experts.balance_weight": 0.01},
    "lora": {"model.config": "llama", "adapter.kind": "lora", "adapter.rank": 4},
    "schedule-free": {"model.config": "llama", "optim.name": "schedule-free", "optim.schedule": "constant"},
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    for kind in ("llama", "deepseek_v3"):
        write_config(tmp_path / kind, kind, vocab_size=320)
    yield tmp_path


def trained(kind: str, run: str, steps: int, **more: Any) -> Any:
    values = {"name": "tiny", "data.path": "text.txt", "train.steps": steps, **COMMON, **KINDS[kind], **more}
    layers = {**PLAIN, "optimizer": "plain"} if kind == "schedule-free" else PLAIN
    return gptoughts.train(values, layers=layers, run=run)


@pytest.mark.parametrize("kind", slow_except(KINDS, "llada", "lora", "schedule-free"))
def test_a_resumed_run_has_the_bits_of_one_that_was_never_stopped(kind: str, here: Path) -> None:
    whole = trained(kind, "whole", 6).checkpoint
    # The schedule looks ahead to the end of the run, so the first half must be told the same length.
    trained(kind, "halves", 6)
    halves = here / "checkpoints" / "halves"
    (halves / "latest").write_text("step-000003\n", encoding="ascii")
    for late in halves.glob("step-000006"):
        late.rename(halves / "set-aside")
    resumed = trained(kind, "halves", 6).checkpoint
    assert resumed != halves / "set-aside" and resumed.name == whole.name == "step-000006"
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, other = load_file(whole / file), load_file(resumed / file)
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == [], file


def test_what_was_trained_is_written_with_and_exported(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    trained("llama", "one", 3)
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["generate", "one", "--prompt", "line", "--tokens", "4", "--temperature", "0"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("line")
    with pytest.raises(SystemExit):
        main(["export", "one", "--to", "out-one"])
    told = capsys.readouterr()
    assert "logits over" in told.out, told.err
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained("out-one").eval()(ids).logits
        ours = load("one").model(ids)
    assert (theirs - ours).abs().max() < 1e-5


def test_an_adapter_holds_its_own_weights_and_asks_for_its_base(here: Path) -> None:
    outcome = trained("lora", "adapter", 3)
    held = load_file(outcome.checkpoint / "model.safetensors")
    assert held and all("lora_" in name for name in held)
    config = json.loads((here / "llama" / "config.json").read_text(encoding="utf-8"))
    assert load("adapter").model is not None
    record = json.loads((outcome.checkpoint / "base.json").read_text(encoding="utf-8"))
    (outcome.checkpoint / "base.json").write_text(json.dumps({**record, "digest": "0" * 64}), encoding="utf-8")
    manifest = outcome.checkpoint / "manifest.json"
    files = json.loads(manifest.read_text(encoding="utf-8"))
    del files["files"]["base.json"]
    manifest.write_text(json.dumps(files), encoding="utf-8")
    with pytest.raises(CheckpointError, match="trained on another base"):
        load(str(outcome.checkpoint))
    assert config["model_type"] == "llama"


def test_denoising_is_written_loaded_and_bounded(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained("llada", "fills", 3)
    for words in (
        [
            "generate",
            "fills",
            "--prompt",
            "line",
            "--tokens",
            "8",
            "--steps",
            "4",
            "--block-length",
            "4",
            "--remasking",
            "random",
        ],
        ["eval", "likelihood", "fills", "--draws", "4", "--windows", "2", "--json"],
    ):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 0
    out = capsys.readouterr().out
    figures = json.loads(out[out.index("{") :])
    assert 0 < figures["nats_per_token"] < 20 and figures["draws"] == 4
    with pytest.raises(SystemExit) as refused:
        main(["eval", "perplexity", "fills"])
    assert refused.value.code == 2 and "eval likelihood" in capsys.readouterr().err


def test_settings_of_a_sample_that_cannot_be_written_stop_before_training(here: Path) -> None:
    with pytest.raises(ConfigError, match="block"):
        trained("llada", "odd", 3, **{"sample.tokens": 10, "diffusion.steps": 5, "diffusion.block_length": 4})
    assert not Path("checkpoints/odd").exists() or not any(Path("checkpoints/odd").glob("step-*"))


def test_a_default_prompt_that_the_tokenizer_lacks_is_an_empty_one(here: Path) -> None:
    Path("dna.txt").write_text("ACGT" * 2000, encoding="utf-8")
    more = {"data.path": "dna.txt", "data.tokenizer": "chars"}
    assert trained("llama", "dna", 1, **more).prompt == ""
    with pytest.raises(ConfigError, match=r"sample.prompt: character 'x'"):
        trained("llama", "dna2", 1, **more, **{"sample.prompt": "x"})


def test_the_mask_of_pretrained_weights_is_theirs(here: Path) -> None:
    from gptoughts.config.loader import from_values
    from gptoughts.data.tokenizers.tokenizer import ByteTokenizer
    from gptoughts.engine.from_recipe import mask_of

    folder = here / "llada"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llada", "mask_token_id": 5}), encoding="utf-8")
    values = {"name": "x", "train.steps": 1, "objective": "masked-diffusion", "model.family": "llada"}
    assert mask_of(from_values(values, "t").recipe, ByteTokenizer()) == 257
    assert mask_of(from_values({**values, "model.path": str(folder)}, "t").recipe, ByteTokenizer()) == 5


def test_keys_of_experts_are_no_wish_of_a_dense_model(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"experts: has no effect, the llama of model.config has no experts"):
        trained("llama", "dense", 1, **{"experts.balance_weight": 0.01})


def test_experts_and_noise_are_logged(here: Path) -> None:
    trained("mixture", "mixture", 3)
    rows = read(here / "out" / "mixture" / "metrics.jsonl")
    assert all(
        {"train/balance_loss", "train/load_max", "train/dead_experts"} <= row.keys() for row in rows if "train/loss" in row
    )
    assert any(key.startswith("experts/") for row in rows for key in row)
    trained("llada", "noise", 3)
    rows = read(here / "out" / "noise" / "metrics.jsonl")
    assert any(key.startswith("train/loss_t") for row in rows for key in row)


def test_patience_ends_a_run_and_the_last_step_is_a_whole_one(here: Path) -> None:
    # At this rate the loss on held-out text rises from the second validation on.
    outcome = trained("llama", "patient", 400, **{"optim.learning_rate": 0.5, "eval.every": 2, "eval.patience": 2})
    assert outcome.progress.step < 400
    assert outcome.checkpoint is not None and outcome.checkpoint.name == f"step-{outcome.progress.step:06d}"
    evidence = (here / "out" / "patient" / "evidence.json").read_text(encoding="utf-8")
    again = trained("llama", "patient", 400, **{"optim.learning_rate": 0.5, "eval.every": 2, "eval.patience": 2})
    assert again.progress == outcome.progress
    assert (here / "out" / "patient" / "evidence.json").read_text(encoding="utf-8") == evidence
    on = trained("llama", "patient", outcome.progress.step + 3, **{"optim.learning_rate": 0.5, "eval.every": 2})
    assert on.progress.step == outcome.progress.step + 3
    assert os.environ["XDG_CACHE_HOME"].startswith(str(here))


class Rows(gptoughts.Callback):
    """A user's callback that notes what it is called with."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.logged: list[int] = []

    def on_start(self, engine: Any, progress: Any) -> None:
        self.calls.append(f"start {progress.step}")

    def due(self, step: int, last: bool) -> bool:
        return step % 2 == 0

    def on_step(self, engine: Any, progress: Any, stats: Any, last: bool) -> None:
        self.calls.append(f"step {progress.step}{' last' if last else ''}")

    def on_log(self, step: int, values: Any) -> None:
        self.logged.append(step)
        assert "train/loss" in values or "eval/loss" in values

    def on_end(self, engine: Any, progress: Any) -> None:
        self.calls.append(f"end {progress.step}")


def test_a_silent_run_prints_nothing_and_calls_the_users_callbacks(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    values = {"name": "tiny", "data.path": "text.txt", "train.steps": 4, **COMMON, **KINDS["llama"]}
    mine = Rows()
    result = gptoughts.train(values, layers=PLAIN, run="silent", callbacks=[mine], track=["jsonl"], verbose=False)
    said = capfd.readouterr()
    assert said.out == "" and [line for line in said.err.splitlines() if "gptoughts" in line or "data:" in line] == []
    assert mine.calls == ["start 0", "step 2", "step 4 last", "end 4"] and sorted(set(mine.logged)) == [1, 2, 3, 4]
    rows = read(result.out / "metrics.jsonl")
    epochs = [row["train/epoch"] for row in rows if "train/epoch" in row]
    assert epochs == pytest.approx([number * epochs[0] for number in range(1, 5)]) and 0 < epochs[0] < 1
    assert result.history == {key: [row.get(key) for row in rows] for key in result.history}
    assert [loss for loss in result.history["train/loss"] if loss is not None] == [
        row["train/loss"] for row in rows if "train/loss" in row
    ]
    assert "data:image/png;base64," in result._repr_html_() and "<th>validation loss</th>" in result._repr_html_()
    memory = [row for row in rows if "memory/measured_bytes" in row]
    assert len(memory) == 1 and memory[0]["memory/measured_bytes"] > 0
    assert not (result.out / "loss.png").exists(), "only the trackers that were asked for"
