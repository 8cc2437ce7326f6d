"""Models of Hugging Face's layout that write from a script, through the command: where texts begin, where they end, what is too long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoughts.cli.generate import asked, begun, fitting, noted_ends
from gptoughts.cli.generate import generate as command
from gptoughts.config.loader import from_values
from gptoughts.data.tokenizers.tokenizer import load_tokenizer
from gptoughts.errors import ConfigError, DataError
from gptoughts.inference.load import exported_recipe
from tests.support.chat_parts import NAMES, resolve_model_folder, tokenizer_json

WORDS: dict[str, Any] = dict.fromkeys(
    ("base", "steps", "block_length", "remasking", "guidance", "memory", "offload")
) | {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0, "chat": False, "tokens": 12}  # fmt: skip


def id_of(kind: str, name: str) -> int:
    from tokenizers import Tokenizer

    found: int | None = Tokenizer.from_str(tokenizer_json(kind)).token_to_id(name)
    assert found is not None, name
    return found


def scripted(family: str, folder: Path, script: dict[int, int]) -> Path:
    """A tiny Llama in `folder` that writes script[token] behind each token; its blocks add nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    resolve_model_folder(family, folder)
    config = LlamaConfig(
        vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        for place, (token, following) in enumerate(script.items()):
            model.model.embed_tokens.weight[token, place] = 1
            model.lm_head.weight[following, place] = 1
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


@pytest.fixture
def chatty(tmp_path: Path) -> Path:
    """What it writes behind a turn: `a`, the end of a turn, and so on for ever."""
    line, word, end = id_of("chatml", "Ċ"), id_of("chatml", "a"), id_of("chatml", "<|im_end|>")
    return scripted("chatml", tmp_path / "chatty", {line: word, word: end, end: word})


def said(capsys: pytest.CaptureFixture[str], folder: Path, *prompt: str, **words: Any) -> str:
    """What the command prints."""
    capsys.readouterr()
    assert command(str(folder), prompt, **{**WORDS, **words}) == 0
    return capsys.readouterr().out


def test_a_chat_ends_with_its_turn(chatty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, chatty, "fox", chat=True) == "> fox\na\n"
    assert said(capsys, chatty, "\n", tokens=3) == "\na<|im_end|>a\n"  # text is no chat


def test_a_noted_end_ends_a_text(chatty: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for noted in (end := id_of("chatml", "<|im_end|>"), [5, end]):
        (chatty / "generation_config.json").write_text(json.dumps({"eos_token_id": noted}))
        assert said(capsys, chatty, "\n") == "\na\n"
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert noted_ends([tmp_path, tmp_path / "base", chatty]) == {3, 4}
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(DataError, match=r"generation_config\.json: eos_token_id must be a number"):
        noted_ends([tmp_path / "base"])


def test_a_model_without_a_template_is_named(chatty: Path) -> None:
    (chatty / "tokenizer_config.json").write_text(json.dumps(NAMES["chatml"]))
    with pytest.raises(ConfigError, match=r"--chat: .*chatty has no chat template\.\n  Try: omit --chat"):
        command(str(chatty), ["fox"], **{**WORDS, "chat": True})


def test_texts_begin_as_the_tokenizer_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin, end, word = (id_of("llama3", name) for name in ("<|begin_of_text|>", "<|end_of_text|>", "a"))
    folder = scripted("llama3", tmp_path / "begins", {begin: word, word: end})
    assert said(capsys, folder) == "a\n"
    assert begun(load_tokenizer(str(folder)), exported_recipe(folder, None), ["", "a"]) == [[begin], [begin, word]]


def test_a_prompt_that_is_too_long_is_said(chatty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(str(chatty), ["\n", "0" * 40 + "\n"], **{**WORDS, "tokens": 1})
    told = capsys.readouterr()
    assert "note: prompt 2: 42 tokens exceed the context of 32; its beginning is dropped\n" in told.err
    assert "prompt 1" not in told.err
    with pytest.raises(DataError, match=r"prompt 1: \d+ tokens exceed the context of 32\.\n  Try: a shorter prompt"):
        command(str(chatty), ["0" * 40], **{**WORDS, "chat": True})


def test_tokens_that_nobody_asked_for() -> None:
    def recipe(length: int) -> Any:
        return from_values({"name": "x", "train.steps": 1, "data.sequence_length": length, "sample.tokens": 48}, "test").recipe

    assert asked(recipe(64), {}, {}, None).sample.tokens == 200
    assert asked(recipe(64), {}, {}, 5).sample.tokens == fitting(recipe(64)) == 48
    assert fitting(recipe(40)) == 20
    assert asked(recipe(64), {"tokens": 7}, {}, 5).sample.tokens == 7
