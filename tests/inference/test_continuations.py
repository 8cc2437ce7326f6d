"""Log-likelihoods of continuations: token for token what one forward per text gives, in any batch, and minus the bound for diffusion."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoughts.data.tokenizers.tokenizer import ByteTokenizer, JsonTokenizer
from gptoughts.errors import ConfigError, DataError
from gptoughts.inference.eval.continuations import (
    Encoder,
    Pair,
    buckets,
    encoder_of,
    log_likelihoods,
    padded,
    tokenizer_settings,
    truncated,
)
from gptoughts.inference.eval.likelihood import bound
from gptoughts.inference.load import load
from tests.support.engines import engine_of, plan_of, recipe_of
from tests.support.hellaswag_rows import TEXT, model_folder, tokenizer_json

BYTES = Encoder(ByteTokenizer(), (), 256, 256)
EAGER = {"precision": "fp32", "compile": "eager"}
PAIRS = [Pair(list(range(1, 4 + size)), list(range(50, 51 + 3 * size % 8))) for size in range(9)]


def one_by_one(model: torch.nn.Module, pair: Pair, length: int) -> float:
    """The sum over the continuation's tokens of the log-softmax of one forward without padding."""
    ids = [*pair.context, *pair.continuation][-length - 1 :]
    with torch.no_grad():
        shares = model(torch.tensor([ids[:-1]]))[0].float().log_softmax(dim=-1)
    places = range(len(ids) - 1 - len(pair.continuation), len(ids) - 1)
    return sum(float(shares[place, ids[place + 1]]) for place in places)


@pytest.mark.parametrize("family", ["modern", "llama"])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_batches_of_any_size_give_the_sums_of_single_forwards(family: str, batch: int) -> None:
    recipe = recipe_of(family)
    pairs = [*PAIRS, Pair(list(range(1, 60)), [7, 8, 9])]  # the last context is cut to 32 tokens
    done: list[tuple[int, int]] = []
    with engine_of(recipe, plan_of(recipe, EAGER)) as engine:
        found = log_likelihoods(engine, pairs, batch=batch, report=lambda now, total: done.append((now, total)))
        expected = [one_by_one(engine.bare, pair, recipe.data.sequence_length) for pair in pairs]
        assert engine.bare.training
    assert found == pytest.approx(expected, abs=1e-4) and len(set(found)) == len(pairs)
    assert done[-1] == (10, 10) and len(done) == -(-10 // batch)


def test_masked_diffusion_is_estimated_by_the_bound() -> None:
    recipe = recipe_of("llada")
    pairs = [*PAIRS[:4], Pair(list(range(1, 60)), [7, 8, 9])]
    with engine_of(recipe, plan_of(recipe, EAGER)) as engine:
        found = log_likelihoods(engine, pairs, batch=16, mask_id=127, draws=32)
        for value, (context, continuation) in zip(found, pairs, strict=True):
            prompt = context[-(recipe.data.sequence_length - len(continuation)) :]
            expected = bound(engine.bare, continuation, 127, prompt=prompt, draws=32, seed=recipe.seed)
            assert value == pytest.approx(-expected.nats, rel=1e-5)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 10)), min_size=1, max_size=20), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_rows_are_sorted_by_length_and_labels_are_the_continuation(sizes: list[tuple[int, int]], size: int) -> None:
    pairs = [Pair([1] * context, list(range(100, 100 + continuation))) for context, continuation in sizes]
    chunks = buckets(pairs, size)
    assert sorted(index for chunk in chunks for index in chunk) == list(range(len(pairs)))
    lengths = [sum(sizes[index]) for chunk in chunks for index in chunk]
    assert lengths == sorted(lengths, reverse=True) and all(len(chunk) == size for chunk in chunks[:-1])
    for chunk in chunks:
        inputs, labels = padded([pairs[index] for index in chunk], 16)
        assert inputs.shape == labels.shape and inputs.shape[1] <= 16
        for index, row in zip(chunk, labels, strict=True):
            assert row[row >= 0].tolist() == pairs[index].continuation


def test_spaces_before_the_continuation_belong_to_it() -> None:
    for context, continuation in (("ab", " cd"), ("ab ", "cd"), ("ab \n", "cd"), ("a b ", " cd")):
        (pair,) = BYTES.pairs([(context, continuation)])
        text = context + continuation
        assert bytes(pair.context).decode() == context.rstrip() and bytes([*pair.context, *pair.continuation]).decode() == text


def test_a_text_is_encoded_as_a_whole() -> None:
    encoder = encoder_of(JsonTokenizer(tokenizer_json().encode(), "file", "the test"), None)
    context, continuation = TEXT[:40], TEXT[40:80]
    (pair,) = encoder.pairs([(context, continuation)])
    whole, before = (encoder.tokenizer.encode(text).tolist() for text in (context + continuation, context.rstrip()))
    assert pair.context == whole[: len(before)] and pair.continuation == whole[len(before) :]


def test_ids_that_transformers_puts_before_a_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    plain, before = (JsonTokenizer(tokenizer_json(begin).encode(), "file", "the test") for begin in (False, True))
    assert encoder_of(plain, None) == Encoder(plain, (), 0, 0)
    assert encoder_of(before, None).start == (0,)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": True, "bos_token": {"content": "Ġ"}, "eos_token": "a"})
    )
    found = encoder_of(plain, tmp_path)
    space, letter = (plain.library.token_to_id(name) for name in ("Ġ", "a"))
    assert (found.start, found.prefix, found.end) == ((space,), space, letter)
    assert encoder_of(BYTES.tokenizer, tmp_path) == BYTES
    folder = model_folder(tmp_path / "model", add_begin=True)
    loaded = load(str(folder))
    theirs = AutoTokenizer.from_pretrained(folder)
    encoder = encoder_of(loaded.tokenizer, tokenizer_settings(loaded.recipe, loaded.folder))
    assert encoder.ids([TEXT]) == [theirs.encode(TEXT)] and encoder.prefix == theirs.bos_token_id


def test_what_cannot_be_scored_is_an_error() -> None:
    assert truncated([Pair([1] * 9, [2] * 8), Pair([1] * 10, [2] * 8)], 16) == 1
    with pytest.raises(ConfigError, match=r"data.sequence_length 16: shorter than a continuation to score. Found 17 tokens"):
        truncated([Pair([1], [2] * 17)], 16)
    with pytest.raises(DataError, match="no token separates"):
        BYTES.pairs([("   ", "x")])
    assert np.isfinite(padded([Pair([1], [2])], 4)[0].numpy()).all()
