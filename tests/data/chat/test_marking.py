"""`data show` prints what is trained on: marks stand around learned tokens and nothing else, and a sample cannot steer a terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoughts.cli.data import show
from gptoughts.data.chat.marking import documents, learned, marked, render_row, row_summary
from gptoughts.data.tokenizers.tokenizer import ByteTokenizer, load_tokenizer
from gptoughts.errors import ConfigError
from tests.support.chat_parts import resolve_model_folder


@settings(max_examples=80, deadline=None)
@given(text=st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Z"]), max_size=30), seed=st.integers(0, 99))
def test_marks_stand_around_what_is_learned(text: str, seed: int) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    taught = np.random.default_rng(seed).random(len(ids)) < 0.5
    out = marked(tokenizer, ids, np.where(taught, ids.astype(np.int64), -100), "brackets")
    assert out.replace("⟦", "").replace("⟧", "") == text
    assert "".join(re.findall("⟦([^⟧]*)⟧", out)) == "".join(sign for sign, one in zip(text, taught, strict=True) if one)
    assert "⟧⟦" not in out


def test_a_sample_cannot_steer_the_terminal() -> None:
    tokenizer = ByteTokenizer()
    ids = np.append(tokenizer.encode("a\x1b[31mb\x07\tc\n\u202e👩‍🚀"), tokenizer.eot_id)
    out = marked(tokenizer, ids, np.full(len(ids), -100), "brackets")
    assert out == "a\\x1b[31mb\\x07\tc\n\\u202e👩‍🚀<|endoftext|>"
    colored = marked(tokenizer, ids[:1], ids[:1].astype(np.int64), "color")
    assert colored == "\x1b[32ma\x1b[0m"


def test_rows_of_every_kind() -> None:
    tokenizer = ByteTokenizer()
    ids = np.append(tokenizer.encode("abcdef"), [256, 256]).astype(np.uint16)
    assert render_row(tokenizer, {"input_ids": ids[:6]}, "brackets") == "a⟦bcdef⟧"
    labels = np.array([-100, 98, -100, -100, 101, 102, -100, -100])
    row = {"input_ids": ids, "labels": labels, "positions": np.array([0, 1, 0, 1, 2, 3, 0, 1])}
    assert render_row(tokenizer, row, "brackets") == "a⟦b⟧\n· · ·\ncd⟦ef⟧"
    assert row_summary(row) == "6 tokens in 2 conversations (2 + 4), 2 padding, 3 learned (50.0 %)"
    span = {"input_ids": ids, "mask": np.arange(8) < 6, "starts": np.int64(2), "ends": np.int64(3)}
    assert render_row(tokenizer, span, "brackets") == "ab⟦cd⟧ef" and documents(span)[1] == 2
    assert (learned({**span, "starts": np.int64(-100), "ends": np.int64(-100)}) == -100).all()


def test_chat_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = resolve_model_folder("chatml", tmp_path / "tokenizer")
    rows = [{"prompt": f"who {number}?", "response": f"the fox {number}"} for number in range(20)]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    fields = {
        "data.path": str(tmp_path / "chat.jsonl"), "data.format": "chat", "data.tokenizer": str(folder),
        "data.sequence_length": "160", "data.cache": str(tmp_path / "cache"),
    }  # fmt: skip
    assert show("quickstart", fields, {}, 2) == 0
    out = capsys.readouterr().out
    assert out.count("--- sample") == 2 and "conversations (" in out and "% full" in out
    for number in re.findall(r"who (\d+)\?", out):
        assert f"assistant\n⟦the fox {number}<|im_end|>⟧" in out
    assert load_tokenizer(str(folder)).kind == "file"


def test_text_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox\n" * 400)
    fields = {
        "data.path": str(tmp_path / "a.txt"), "data.tokenizer": "bytes", "data.sequence_length": "32", "train.global_batch": "4",
        "data.cache": str(tmp_path / "cache"),
    }  # fmt: skip
    assert show("quickstart", fields, {}, 6) == 0
    out = capsys.readouterr().out
    assert out.count("--- sample") == 6 and "33 tokens, 0 padding, 32 learned" in out
    with pytest.raises(ConfigError, match="data show uses no layers"):
        show("quickstart", fields, {"precision": "bf16"}, 1)
