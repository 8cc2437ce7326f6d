"""Generation: deterministic, each prompt for itself, within the context, in whole characters."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoughts.config.loader import ModelConfig
from gptoughts.data.tokenizers.tokenizer import JsonTokenizer
from gptoughts.errors import ConfigError, DataError
from gptoughts.inference.generate.autoregressive import _Stream, continuation, generate
from gptoughts.models.family import family_of, initialize
from gptoughts.models.gpt.gpt import GPT
from tests.support.byte_models import FORMS, Bytes
from tests.support.chat_parts import tokenizer_json


class WithoutEnd(Bytes):
    eot_id = None


@pytest.fixture(params=FORMS)
def model(request: pytest.FixtureRequest) -> GPT:
    return make(**FORMS[request.param])


def make(sequence_length: int = 16, **words: Any) -> GPT:
    config = ModelConfig(depth=2, width=32, heads=4, **words)
    model = GPT(config, 320, sequence_length)
    initialize(model, family_of("gpt"), config, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def scripted(model: GPT, script: list[int], rows: int = 320) -> list[list[int]]:
    """Make `model` predict the bytes of `script` one by one; returns the list that collects what it was shown."""
    shown: list[list[int]] = []

    def forward(input_ids: torch.Tensor, cache: Any) -> torch.Tensor:
        shown.append(input_ids[0].tolist())
        cache.used += input_ids.shape[1]
        logits = torch.zeros(*input_ids.shape, rows)
        logits[0, -1, script[len(shown) - 1]] = 100
        return logits

    model.forward = forward
    return shown


def test_same_seed_same_text(model: GPT) -> None:
    first = generate(model, Bytes(), ["abc"], 40, temperature=1.0, seed=5)
    torch.rand(3)
    assert generate(model, Bytes(), ["abc"], 40, temperature=1.0, seed=5) == first
    assert generate(model, Bytes(), ["abc"], 40, temperature=1.0, seed=6) != first


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_does_not_feel_its_neighbors(model: GPT, temperature: float) -> None:
    prompts = [[1, 2, 3], [7], [9] * 30, [1, 2, 3]]
    words: dict[str, Any] = {"max_new_tokens": 30, "temperature": temperature, "seed": 3}
    together = generate(model, Bytes(), prompts, **words)
    assert together == [generate(model, Bytes(), [prompt], **words)[0] for prompt in prompts]
    assert together[0] == together[3]


def test_the_cache_changes_nothing(model: GPT) -> None:
    """Greedy text within the context is what the whole forward over all tokens says."""
    model.eval()
    ids = [5, 6, 7]
    with torch.no_grad():
        while len(ids) < 16:
            ids.append(int(model(torch.tensor([ids]))[0, -1, :257].argmax()))
    assert generate(model, Bytes(), [[5, 6, 7]], 13, temperature=0, stop_at_eot=False) == [ids[3:]]


def test_ids_that_pad_the_vocabulary_never_appear(model: GPT) -> None:
    with torch.no_grad():
        model.embed.weight[257:] *= 100
    written = generate(model, Bytes(), [[1]], 200, temperature=5.0, top_k=0, stop_at_eot=False)
    assert len(written[0]) == 200 and max(written[0]) <= 256


def test_a_full_context_slides_by_half() -> None:
    model = make(sequence_length=8)
    shown = scripted(model, script := list(range(100, 120)))
    assert generate(model, Bytes(), [[1, 2, 3, 4, 5]], 20, temperature=0) == [script]
    assert shown[:4] == [[1, 2, 3, 4, 5], [100], [101], [102]]
    assert shown[4] == [100, 101, 102, 103]  # nine tokens would not fit: the newest four are read again
    assert shown[5:9] == [[104], [105], [106], [107]]
    assert shown[9] == [105, 106, 107, 108]


def test_a_long_prompt_keeps_its_end() -> None:
    shown = scripted(model := make(sequence_length=8), [50, 51])
    generate(model, Bytes(), [list(range(20))], 2, temperature=0)
    assert shown == [list(range(12, 20)), [17, 18, 19, 50]]


@pytest.mark.parametrize("sequence_length", [1, 2, 3])
def test_the_smallest_contexts_write_on(sequence_length: int) -> None:
    written = generate(make(sequence_length), Bytes(), [[1, 2, 3, 4]], 12, stop_at_eot=False)
    assert len(written[0]) == 12


def test_end_of_text_stops_and_is_left_out() -> None:
    scripted(model := make(), [65, 66, 256, 67, 68])
    assert generate(model, Bytes(), ["x"], 5, temperature=0) == ["AB"]
    scripted(model, [65, 66, 256, 67, 68])
    assert generate(model, Bytes(), [[1]], 5, temperature=0, stop_at_eot=False) == [[65, 66, 256, 67, 68]]
    scripted(model, [256])
    assert generate(model, Bytes(), ["x"], 5, temperature=0) == [""]


def test_an_empty_prompt_starts_from_end_of_text() -> None:
    shown = scripted(model := make(), [65])
    assert generate(model, Bytes(), [""], 1) == ["A"]
    assert shown == [[256]]
    with pytest.raises(DataError, match="the tokenizer has no end-of-text token"):
        generate(model, WithoutEnd(), [""], 1)
    assert generate(model, Bytes(), [], 1) == []


def test_text_streams_in_whole_characters() -> None:
    script = list("aé漢😀".encode())
    scripted(model := make(), script + script[:2])
    pieces: list[tuple[int, str]] = []
    text = generate(
        model,
        Bytes(),
        ["x"],
        len(script) + 2,
        temperature=0,
        on_text=lambda index, piece: pieces.append((index, piece)),
    )
    assert pieces == [(0, "a"), (0, "é"), (0, "漢"), (0, "😀"), (0, "a"), (0, "\N{REPLACEMENT CHARACTER}")]
    assert text == ["".join(piece for _, piece in pieces)]


def test_a_word_keeps_its_space_behind_a_prompt() -> None:
    raw = tokenizer_json("mistral")
    tokenizer = JsonTokenizer(raw.encode(), "file", "the test")
    prompt, script = (tokenizer.encode(text).tolist() for text in ("the user", "said to the lazy dog"))
    model, pieces = make(64), list[str]()
    model.vocab_size = tokenizer.vocab_size
    for asked in (["the user"], [prompt]):
        scripted(model, script, tokenizer.vocab_size)
        pieces.clear()
        text = generate(model, tokenizer, asked, len(script), temperature=0, on_text=lambda _, piece: pieces.append(piece))
        assert "".join(pieces) == " said to the lazy dog"
        assert text == ([" said to the lazy dog"] if asked == ["the user"] else [script])


class Counted(Bytes):
    """Counts the ids that are decoded."""

    def __init__(self) -> None:
        self.decoded = 0

    def decode(self, ids: Iterable[int]) -> str:
        found = list(ids)
        self.decoded += len(found)
        return super().decode(found)


def test_a_token_of_a_long_text_costs_no_more_than_one_of_a_short_text() -> None:
    scripted(model := make(512), [65] * 400)
    generate(model, tokenizer := Counted(), ["x"], 400, temperature=0, on_text=lambda *_: None)
    assert tokenizer.decoded < 400 * 20


@settings(max_examples=150, deadline=None)
@given(
    before=st.binary(max_size=6), new=st.lists(st.sampled_from([*"aé漢😀".encode(), 65, 0xFF, 256]), min_size=1, max_size=24)
)
def test_bytes_stream_as_they_are_decoded_whole(before: bytes, new: list[int]) -> None:
    """As if the whole text were decoded again after each token."""
    pieces: list[str] = []
    stream = _Stream(Bytes(), 0, list(before), lambda _, piece: pieces.append(piece))
    expected, out = [], ""
    for count, token in enumerate(new, 1):
        stream.add(token)
        text = Bytes().decode(new[:count])
        if not text.endswith("\N{REPLACEMENT CHARACTER}") and text != out:
            expected.append(text[len(out) :])
            out = text
    stream.close()
    if (text := Bytes().decode(new)) != out:
        expected.append(text[len(out) :])
    assert pieces == [piece for piece in expected if piece]
    assert continuation(Bytes(), list(before), new) == Bytes().decode(new)


def test_streams_name_their_prompt(model: GPT) -> None:
    pieces: dict[int, str] = {0: "", 1: ""}

    def collect(index: int, piece: str) -> None:
        pieces[index] += piece

    assert generate(model, Bytes(), ["a", "b"], 20, on_text=collect) == list(pieces.values())


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = make(dropout=0.5).train(training)
    first = generate(model, Bytes(), ["a"], 10)
    assert generate(model, Bytes(), ["a"], 10) == first  # dropout is off
    assert model.training == training
    assert torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="stop here"):
        generate(model, Bytes(), ["a"], 10, on_text=_stop)
    assert model.training == training


def _stop(index: int, piece: str) -> None:
    raise RuntimeError("stop here")


def test_compiled_blocks_are_not_compiled_for_every_length() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = make(), CompileCounter()
    expected = generate(model, Bytes(), ["abc"], 12)
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend=counter)
    assert generate(model, Bytes(), ["abc"], 12) == expected
    assert counter.frame_count == 0
    model(torch.arange(16)[None])
    assert counter.frame_count == 1


@pytest.mark.parametrize("prompt", [[257], [-1], [319]])
def test_ids_outside_the_vocabulary_are_refused(model: GPT, prompt: list[int]) -> None:
    with pytest.raises(DataError, match=rf"prompt: token ids must be below the vocabulary size 257\. Found {prompt[0]}"):
        generate(model, Bytes(), [prompt], 4)


def test_settings_out_of_range_are_refused(model: GPT) -> None:
    with pytest.raises(ConfigError, match=r"max_new_tokens: must be at least 1\. Found 0"):
        generate(model, Bytes(), ["a"], 0)
    with pytest.raises(ConfigError, match="--top-p"):
        generate(model, Bytes(), ["a"], 1, top_p=2.0)
