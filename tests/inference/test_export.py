"""Exports: transformers opens them, they are the same bits, and what is not the same model is not written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, logging

import gptoughts
from gptoughts.config.loader import from_values
from gptoughts.data.tokenizers.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from gptoughts.errors import CheckpointError, ConfigError
from gptoughts.inference import export as exporting
from gptoughts.inference import export_adapter
from gptoughts.inference.export_adapter import export_checkpoint
from gptoughts.inference.load import load
from gptoughts.models.family import family_of, initialize
from gptoughts.models.gpt.gpt import GPT
from gptoughts.models.hf.family import hf_family
from gptoughts.models.hf.weights import Pretrained
from tests.models.hf.hf_configs import LENGTH
from tests.models.hf.test_hf import engine_of, recipe_of, saved
from tests.support.engines import FAMILIES_UNDER_TEST

TEXT = "the quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def words() -> Tokenizer:
    """A tokenizer of few words, as a tokenizer.json."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers

    listed = ["<|endoftext|>", "[UNK]", *sorted(set(TEXT.split()))]
    fast = Fast(models.WordLevel({word: index for index, word in enumerate(listed)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.add_special_tokens(["<|endoftext|>", "[UNK]"])
    return JsonTokenizer(fast.to_str().encode(), "json", "the test")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "deepseek_v2", "deepseek_v3", "mixtral"])
def test_a_round_trip_gives_the_same_bits(kind: str, tmp_path: Path) -> None:
    folder, out = saved(tmp_path / "in", kind), tmp_path / "out"
    (folder / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true}')
    recipe = recipe_of(folder)
    with engine_of(recipe, hf_family(recipe.model), Pretrained(folder)) as engine:
        proof, notes = exporting.export(engine.bare, recipe, words(), out, TEXT)
    assert proof.max_difference == 0 and proof.kl == 0 and proof.tokens == LENGTH
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert "0.25" in (out / "generation_config.json").read_text()
    loader = PreTrainedTokenizerFast if kind == "qwen2" else AutoTokenizer
    assert any("AutoTokenizer changes it" in note for note in notes) is (kind == "qwen2")
    assert loader.from_pretrained(out)("the lazy fox")["input_ids"] == [int(index) for index in words().encode("the lazy fox")]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_encoder_round_trip(tmp_path: Path) -> None:
    folder = saved(tmp_path / "in", "bert")
    values = {"name": "t", "objective": "question-answering", "model": {"family": "hf", "path": str(folder)},
              "data": {"sequence_length": LENGTH}, "train": {"steps": 1, "global_batch": 1}}  # fmt: skip
    recipe = from_values(values, "the test").recipe
    family = hf_family(recipe.model, "question-answering")
    with engine_of(recipe, family, Pretrained(folder, "question-answering")) as engine:
        proof, _ = exporting.export(engine.bare, recipe, words(), tmp_path / "out", TEXT)
    assert proof.max_difference == 0 and proof.tokens == 2


def native(**model: Any) -> tuple[GPT, Any]:
    recipe = from_values(
        {
            "name": "t",
            "model": {"vocab_size": 128, **model},
            "data": {"sequence_length": LENGTH},
            "train": {"steps": 1, "global_batch": 1},
        },
        "the test",
    ).recipe
    made = GPT(recipe.model, 128, LENGTH)
    initialize(made, family_of("gpt"), recipe.model, 1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval(), recipe


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (FAMILIES_UNDER_TEST["gpt2"], "gpt2"),
        (FAMILIES_UNDER_TEST["modern"], "qwen3"),
        ({**FAMILIES_UNDER_TEST["modern"], "qk_norm": False, "tied": False}, "llama"),
        ({**FAMILIES_UNDER_TEST["modern"], "qk_norm": False, "bias": True}, "llama"),
    ],
)
def test_native_models_take_the_layout_of_their_form(model: dict[str, Any], kind: str, tmp_path: Path) -> None:
    made, recipe = native(**model)
    proof, notes = exporting.export(made, recipe, words(), tmp_path / "out", TEXT)
    assert notes[0] == f"layout: {kind}" and proof.holds and proof.max_difference < 1e-4
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.config.model_type == kind
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in made.parameters())


def test_a_model_that_denoises_takes_its_published_layout(tmp_path: Path) -> None:
    made, recipe = native(**{**FAMILIES_UNDER_TEST["modern"], "qk_norm": False})
    both_ways = GPT(made.config, 128, LENGTH, causal=False)
    both_ways.load_state_dict(made.state_dict())
    with pytest.raises(ConfigError, match=r"model.family: no transformers layout for GPT"):
        exporting.export(both_ways, recipe, words(), tmp_path / "out", TEXT)
    proof, notes = exporting.export(both_ways, recipe, words(), tmp_path / "out", TEXT, mask_id=127)
    assert notes == ["layout: llada"] and proof.max_difference == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}


def test_what_no_layout_holds(tmp_path: Path) -> None:
    made, recipe = native(**{**FAMILIES_UNDER_TEST["modern"], "positions": "learned"})
    with pytest.raises(ConfigError, match=r"model: no layout of transformers supports it") as told:
        exporting.export(made, recipe, words(), tmp_path / "out", TEXT)
    assert "positions = 'learned'" in str(told.value) and list(tmp_path.iterdir()) == []
    made, recipe = native(**FAMILIES_UNDER_TEST["modern"], bias=True)
    with pytest.raises(ConfigError, match=r"qk_norm = True"):
        exporting.export(made, recipe, words(), tmp_path / "out", TEXT)


def test_another_model_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, recipe = native(**FAMILIES_UNDER_TEST["modern"])
    real = exporting._logits
    monkeypatch.setattr(exporting, "_logits", lambda model, ids: real(model, ids) + torch.randn(1, 1, 128))
    with pytest.raises(CheckpointError, match=r"reopened model differs beyond tolerance, nothing written\. Found logits over"):
        exporting.export(made, recipe, words(), tmp_path / "out", TEXT)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_folder_a_short_text_and_bytes(tmp_path: Path) -> None:
    made, recipe = native(**FAMILIES_UNDER_TEST["modern"])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"folder exists and is not empty"):
        exporting.export(made, recipe, words(), tmp_path / "taken", TEXT)
    with pytest.raises(ConfigError, match=r"--text: needs at least two tokens to compare logits\. Found 1"):
        exporting.export(made, recipe, words(), tmp_path / "out", "the")
    _, notes = exporting.export(made, recipe, ByteTokenizer(), tmp_path / "out", TEXT)
    assert "bytes has no transformers format" in notes[1] and not (tmp_path / "out" / "tokenizer.json").exists()


# --- adapters, chat, other programs


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in with a text and, under base/, a small Llama of transformers with a tokenizer of words."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("text.txt").write_text(TEXT * 20)
    tokenizer = words()
    assert isinstance(tokenizer, JsonTokenizer)
    (saved(tmp_path / "base", "llama") / "tokenizer.json").write_bytes(tokenizer.canonical)
    return tmp_path


def trained(run: str, **more: Any) -> Any:
    values = {
        "name": "tiny", "data.path": "text.txt", "data.sequence_length": LENGTH, "train.steps": 3, "train.global_batch": 4,
        "optim.warmup_steps": 0, "optim.learning_rate": 0.02, "eval.batches": 1, "sample.tokens": 4, "adapter.rank": 4, **more,
    }  # fmt: skip
    return gptoughts.train(values, layers={"compile": "eager", "host": "system", "precision": "fp32"}, run=run)


NATIVE = {"model.depth": 2, "model.width": 32, "model.heads": 2, "data.tokenizer": "bytes", "adapter.kind": "lora"}


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ({}, "qwen3"),
        ({"model.norm": "layernorm", "model.positions": "learned", "model.mlp": "gelu", "model.bias": True,
          "model.qk_norm": False, "model.tied": True}, "gpt2"),
        ({"model.family": "llada", "objective": "masked-diffusion", "diffusion.steps": 2, "model.qk_norm": False}, "llada"),
    ],
)  # fmt: skip
def test_an_adapter_over_a_native_model_is_merged_and_written_alone(
    model: dict[str, Any], layout: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained("one", **NATIVE, **model)
    logging.enable_progress_bar()
    capfd.readouterr()
    told = export_checkpoint("one", "whole")
    assert f"layout: {layout}" in told and "logits over" in told
    assert capfd.readouterr().err == ""
    assert not any("lora" in name for name in load_file("whole/model.safetensors"))
    assert "adapter only" in export_checkpoint("one", "alone", adapter_only=True)
    assert all("lora" in name for name in load_file("alone/adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("kind", "base"), [("lora", "full"), ("dora", "full"), ("pissa", "full"), ("lora", "nf4"), ("pissa", "nf4")]
)
def test_an_adapter_alone_is_what_peft_opens_and_merges_again(kind: str, base: str, here: Path) -> None:
    peft = pytest.importorskip("peft")
    trained("one", **{"model.path": "base", "adapter.kind": kind, "adapter.base": base})
    told = export_checkpoint("one", "alone", adapter_only=True)
    assert "logits over" in told and str(here / "base") in told
    if base == "full":
        opened = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "alone")
        ids = torch.tensor([[1, 2, 3, 4]])
        with torch.no_grad():
            assert (opened(ids).logits - load("one").model(ids)).abs().max() < 1e-4
        assert "logits over" in export_checkpoint("alone", "merged")
        assert not any("lora" in name for name in load_file("merged/model.safetensors"))
    with pytest.raises(ConfigError, match=r"already an adapter in peft's layout\.\n  Try: copy the folder"):
        export_checkpoint("alone", "again", adapter_only=True)
    with pytest.raises(ConfigError, match=r"the model has no adapter\.\n  Try: omit --adapter-only"):
        export_checkpoint("base", "again", adapter_only=True)
    assert not Path("again").exists()


def test_an_adapter_that_would_open_as_another_model_is_not_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained("one", **{"model.path": "base", "adapter.kind": "lora"})
    real = export_adapter.save_adapter
    monkeypatch.setattr(
        export_adapter,
        "save_adapter",
        lambda model, config, *rest: real(model, config.model_copy(update={"alpha": config.alpha * 2}), *rest),
    )
    with pytest.raises(CheckpointError, match=r"reopened model differs beyond tolerance, nothing written"):
        export_checkpoint("one", "alone", adapter_only=True)
    assert not Path("alone").exists()


@pytest.mark.parametrize("kind", ["hf", "native", "llada"])
def test_the_template_that_the_model_learned_goes_with_it(kind: str, tmp_path: Path) -> None:
    origin, out = tmp_path / "origin", tmp_path / "out"
    for place, template in (("base", "OLD"), ("tokenizer", "NEW")):
        (origin / place).mkdir(parents=True)
        (origin / place / "chat_template.jinja").write_text(template)
    (origin / "base" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "OLD", "model_max_length": 77}'
    )
    (origin / "tokenizer" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}'
    )
    if kind == "hf":
        folder = saved(tmp_path / "in", "llama")
        recipe = recipe_of(folder)
        with engine_of(recipe, hf_family(recipe.model), Pretrained(folder)) as engine:
            exporting.export(engine.bare, recipe, words(), out, TEXT, origin=origin)
    else:
        made, recipe = native(**{**FAMILIES_UNDER_TEST["modern"], "qk_norm": False})
        if kind == "llada":
            causal, made = made, GPT(made.config, 128, LENGTH, causal=False)
            made.load_state_dict(causal.state_dict())
        exporting.export(made, recipe, words(), out, TEXT, origin=origin, mask_id=127 if kind == "llada" else None)
    read = PreTrainedTokenizerFast.from_pretrained(out)
    assert read.chat_template == "NEW" and read.eos_token == "<|endoftext|>"
    assert kind != "hf" or read.model_max_length == 77


def test_differences_are_measured() -> None:
    one = torch.randn(1, 4, 8)
    assert exporting.compare(one, one).holds
    assert not exporting.compare(one, one + torch.tensor([1.0] + 7 * [0.0])).holds
    assert not exporting.compare(one, one * float("nan")).holds
    with pytest.raises(CheckpointError, match=r"logits of shape \(1, 4, 8\)\. Found \(1, 2, 8\)"):
        exporting.compare(one, one[:, :2])
