"""Bits per byte: bytes are counted exactly for any text and tokenizer, as labels are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoughts.data.tokenizers.tokenizer import ByteTokenizer, CharacterTokenizer, JsonTokenizer, Tokenizer
from gptoughts.inference.eval import text_bytes
from gptoughts.inference.eval.perplexity import perplexity
from gptoughts.inference.eval.text_bytes import LabelBytes, bits_per_byte, has_byte_tokens, label_bytes
from tests.inference.test_export import words
from tests.support.hellaswag_rows import tokenizer_json

BPE = JsonTokenizer(tokenizer_json().encode(), "file", "the test")
LETTERS = "abcdeé漢 \n😀"


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE, CharacterTokenizer(LETTERS)], ids=["bytes", "bpe", "chars"])
@given(texts=st.lists(st.text(st.sampled_from(LETTERS), min_size=1, max_size=30), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_bytes_of_labels_are_those_of_the_text(tokenizer: Tokenizer, texts: list[str]) -> None:
    ids = np.concatenate([part for text in texts for part in (tokenizer.encode(text), [tokenizer.eot_id])]).astype(np.int64)
    first = len(tokenizer.token_bytes(int(ids[0])) or b"")
    expected = sum(len(text.encode()) for text in texts) - first
    assert label_bytes(tokenizer, ids) == expected
    counter = LabelBytes(tokenizer)
    batch = {"input_ids": ids[None]}
    assert [*counter.counted([batch])] == [batch] and counter.total == expected
    ignored = np.where(np.arange(len(ids)) < 2, -100, ids)[None]
    list(counter.counted([{"input_ids": ids[None], "labels": ignored}]))
    second = len(tokenizer.token_bytes(int(ids[1])) or b"")
    assert counter.total == expected - second


def test_long_texts_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_bytes, "CHUNK", 3)
    ids = ByteTokenizer().encode("x" * 11)
    assert [label_bytes(ByteTokenizer(), ids[:size]) for size in range(1, 12)] == list(range(11))


def test_tokens_that_are_not_bytes_are_decoded() -> None:
    tokenizer = words()
    assert not has_byte_tokens(tokenizer) and has_byte_tokens(BPE)
    ids = np.array([*tokenizer.encode("the lazy dog."), tokenizer.eot_id, *tokenizer.encode("the fox")], dtype=np.int64)
    assert label_bytes(tokenizer, ids) == len(b"the lazy dog.") + len(b"the fox") - len(b"the")
    with pytest.raises(ValueError, match="not bytes"):
        LabelBytes(tokenizer)


def test_bits_per_byte_and_perplexity() -> None:
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0) and bits_per_byte(1.0, 0) is None
    assert perplexity(math.log(7)) == pytest.approx(7) and perplexity(1e4) is None
