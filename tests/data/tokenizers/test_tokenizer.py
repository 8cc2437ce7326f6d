"""Every kind of tokenizer gives back its text, keeps special words text, and is the same after saving."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoughts.data.text.sample import spread_sample
from gptoughts.data.text.sources import Document, Source
from gptoughts.data.tokenizers import bpe
from gptoughts.data.tokenizers.tokenizer import (
    BPE_SAMPLE_CHARACTERS,
    ByteTokenizer,
    CharacterTokenizer,
    JsonTokenizer,
    Tokenizer,
    build_tokenizer,
)
from gptoughts.errors import DataError

WORDS = "The quick brown fox jumps over the lazy dog's back. It's 2026, naïve café 世界 🎉!\n\n  def main(x):\n\treturn x + 1\n"
TRICKY = "<|endoftext|> a <|endoftext|></s>[EOS]"
KINDS = ("bytes", "chars", "bpe", "gpt2", "sentencepiece", "wordlevel")


def corpus(*texts: str) -> Source:
    return Source("test", (), lambda source: iter([Document(f"doc{i}", text) for i, text in enumerate(texts)]))


def gpt2_folder(folder: Path) -> Path:
    """A small BPE in the files that GPT-2 was published in."""
    spec = bpe.train([WORDS * 3], 400)
    merges = [" ".join(merge) for merge in spec["model"]["merges"]]
    # Published vocabularies count bytes first, then merges, end-of-text last.
    vocab = {name: index - 1 for name, index in spec["model"]["vocab"].items() if index > 0}
    folder.mkdir(exist_ok=True)
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / "encoder.json").write_text(json.dumps(vocab | {"<|endoftext|>": len(vocab)}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "bpe":
        return build_tokenizer("bpe", corpus(WORDS * 5), 400)
    if request.param == "gpt2":
        return build_tokenizer(str(gpt2_folder(folder)), corpus(WORDS))
    if request.param in ("sentencepiece", "wordlevel"):
        return build_tokenizer(str(library_file(folder / "tokenizer.json", request.param)), corpus(WORDS))
    return build_tokenizer(request.param, corpus(WORDS, TRICKY))


def library_file(path: Path, kind: str) -> Path:
    """Tokenizers of other families, whose end-of-text is a word of the model's own vocabulary."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    if kind == "wordlevel":
        library = Library(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "/s>": 3, "<": 4}, unk_token="<unk>"))
        library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        characters = sorted(set(WORDS + TRICKY) - set(" "))
        pieces = [
            ("<unk>", 0.0),
            ("</s>", 0.0),
            ("▁", -2.0),
            *((character, -5.0) for character in characters),
            ("▁The", -1.0),
        ]
        library = Library(models.Unigram(pieces, unk_id=0))
        library.pre_tokenizer = pre_tokenizers.Metaspace()
        library.decoder = decoders.Metaspace()
    library.save(str(path))
    return path


def test_text_comes_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(WORDS)
    assert ids.dtype == np.uint16 and ids.max() < tokenizer.vocab_size
    if tokenizer.kind != "file":
        assert tokenizer.decode(ids) == WORDS
    assert tokenizer.decode([tokenizer.eot_id]) == ""
    assert tokenizer.decode([tokenizer.vocab_size + 5]) in ("", "\N{REPLACEMENT CHARACTER}")
    assert [part.tolist() for part in tokenizer.encode_batch([WORDS, ""])] == [ids.tolist(), []]


def test_a_special_word_in_the_text_stays_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TRICKY)
    assert tokenizer.eot_id not in ids and len(ids) >= 3
    if tokenizer.kind != "file":
        assert tokenizer.decode(ids) == TRICKY


def test_saved_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gptoughts_tokenizer.json", "tokenizer.json"]
    again = Tokenizer.load(tmp_path)
    assert again.card() == tokenizer.card()
    assert again.encode(WORDS).tolist() == tokenizer.encode(WORDS).tolist()
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.canonical + b" ")
    with pytest.raises(DataError, match="changed since it was saved"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="not a saved tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_stream_never_shows_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(WORDS)
    stream = tokenizer.stream()
    parts = [stream.push(index) for index in ids]
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)
    assert "".join(parts) + stream.close() == tokenizer.decode(ids)


def test_the_rest_of_a_broken_character_comes_at_the_end() -> None:
    stream = ByteTokenizer().stream()
    assert [stream.push(index) for index in "é".encode()[:1]] == [""]
    assert stream.close() == "\N{REPLACEMENT CHARACTER}"


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.sampled_from("ab Z'é世🎉 \n\t<|>.1") | st.characters(exclude_categories=["Cs"]), max_size=200),
    st.integers(1, 40),
)
def test_cut_text_has_the_ids_of_the_whole(text: str, size: int) -> None:
    trained = TRAINED[0] if TRAINED else TRAINED.append(build_tokenizer("bpe", corpus(WORDS * 5), 400)) or TRAINED[0]
    for one in (trained, ByteTokenizer(), CharacterTokenizer(text)):
        parts = list(one.cut(text, size))
        assert "".join(parts) == text
        assert np.concatenate(one.encode_batch(parts)).tolist() == one.encode(text).tolist()
        assert one.decode(one.encode(text)) == text


TRAINED: list[Tokenizer] = []


def test_training_gives_the_same_bytes() -> None:
    texts = [f"{i * i % 9973:x} other{i % 31} {i * 7919 % 65521:b} {WORDS}" for i in range(300)]
    first, second = (build_tokenizer("bpe", corpus(*texts), 500) for _ in range(2))
    assert first.canonical == second.canonical
    assert first.vocab_size == 500 and first.eot_id == 0


@given(st.text("aé1- _\n½", max_size=60), st.integers(1, 7))
def test_long_words_are_cut_for_training_and_nothing_else(text: str, scale: int) -> None:
    text = "".join(character * (scale * 400 if character in "a1-\n" else 1) for character in text)
    parts = list(bpe.cut_words(text))
    assert "".join(parts) == text
    assert all(len(part) >= bpe.MAX_WORD for part in parts[:-1])
    words = re.findall(r"[^\W\d_]+|\d+|\s+|[^\s\w]+", text)
    assert len(parts) == 1 + sum((len(word) - 1) // bpe.MAX_WORD for word in words)


@pytest.mark.parametrize("name", ["dna", "word", "blanks", "blanks before a word"])
def test_text_that_is_not_prose_is_learned_and_encoded(name: str) -> None:
    dna = "".join(np.array(list("ACGT"))[np.random.default_rng(0).integers(0, 4, 1_000_000)])
    text = {"dna": dna, "word": "a" * 1_000_000, "blanks": " " * 1_000_000, "blanks before a word": " " * 1_000_000 + "x"}[name]
    spec = bpe.train([text[:300_000], text[-5000:], dna[:5000]], 300)
    tokenizer = JsonTokenizer(json.dumps(spec).encode(), "bpe", "trained BPE")
    tokenizer.accelerate(["a b"])
    assert tokenizer.engine == "tiktoken"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text) / 1.5


def test_tiktoken_takes_over_only_with_identical_ids(tmp_path: Path) -> None:
    fast = build_tokenizer("bpe", corpus(WORDS * 5), 400)
    slow = JsonTokenizer(fast.canonical, "bpe", "test")
    assert (fast.engine, slow.engine) == ("tiktoken", "tokenizers")
    text = WORDS * 3 + TRICKY + " \n \N{NO-BREAK SPACE}x  1²३"
    assert fast.encode(text).tolist() == slow.encode(text).tolist()
    for change in ({"normalizer": {"type": "NFC"}}, {"pre_tokenizer": bpe.BYTE_LEVEL | {"add_prefix_space": True}}):
        other = JsonTokenizer(json.dumps(fast.spec | change).encode(), "bpe", "test")
        other.accelerate([WORDS])
        assert other.engine == "tokenizers"
    swapped = json.loads(fast.canonical)
    swapped["model"]["merges"].reverse()
    other = JsonTokenizer(json.dumps(swapped).encode(), "bpe", "test")
    other.accelerate([WORDS])
    assert other.engine == "tokenizers"


def test_gpt2_files_and_ranks_are_one_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken

    from_files = JsonTokenizer(json.dumps(bpe.gpt2_from_folder(gpt2_folder(tmp_path))).encode(), "gpt2", "test")
    encoding = bpe.tiktoken_encoding(from_files.spec, from_files.eot_id)
    assert encoding is not None
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    assert bpe.gpt2_from_tiktoken() == from_files.spec
    (tmp_path / "vocab.bpe").rename(tmp_path / "merges.txt")
    (tmp_path / "encoder.json").rename(tmp_path / "vocab.json")
    assert bpe.gpt2_from_folder(tmp_path) == from_files.spec


def test_an_unknown_character_is_named() -> None:
    for unknown in ("é", "\N{PARTY POPPER}"):
        with pytest.raises(
            DataError, match=rf"character '{unknown}' \(U\+{ord(unknown):04X}\) is not among the tokenizer's 3 characters"
        ):
            CharacterTokenizer("abc").encode("ab" + unknown)


def test_a_large_corpus_is_sampled_evenly() -> None:
    source = corpus(*("x" * 1000 + str(i) for i in range(1000)))
    taken = list(spread_sample(source, 100_000, block=100))
    assert abs(sum(map(len, taken)) - 100_000) < 2000
    assert list(spread_sample(source, BPE_SAMPLE_CHARACTERS)) == [document.text for document in source.documents()]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("byte", "tokenizer 'byte': not bytes, chars, gpt2 or bpe, and no such file (did you mean 'bytes'?)"),
        ("{}/empty", "the folder must hold tokenizer.json, vocab.bpe + encoder.json"),
        ("{}/bad.json", "not a tokenizer.json of the tokenizers library"),
        ("{}/no_end.json", "no end-of-text token.\n  Try: add one of <|endoftext|>"),
        ("{}/unknown_model.json", "the tokenizers library cannot load it"),
        ("{}/noeot", "encoder.json: no <|endoftext|>"),
        ("{}/merges", "not a list of merges"),
        ("{}/notjson", "cannot be read"),
        ("bpe", "needs a vocabulary size.\n  Try: --train-bpe 4096"),
    ],
)
def test_a_tokenizer_that_cannot_be_is_named(tmp_path: Path, name: str, message: str) -> None:
    for folder in ("empty", "noeot", "merges", "notjson"):
        (tmp_path / folder).mkdir()
    for folder, vocab, merges in (("noeot", "{}", ""), ("merges", "{}", "a b c"), ("notjson", "x", "")):
        (tmp_path / folder / "vocab.bpe").write_text(merges)
        (tmp_path / folder / "encoder.json").write_text(vocab)
    (tmp_path / "bad.json").write_text("[]")
    (tmp_path / "no_end.json").write_text('{"model": {"type": "WordLevel", "vocab": {"a": 0}}}')
    (tmp_path / "unknown_model.json").write_text('{"model": {"type": "Other", "vocab": {"</s>": 0}}}')
    with pytest.raises(DataError) as caught:
        build_tokenizer(name.format(tmp_path), corpus(WORDS)).encode("x")
    assert message in str(caught.value) and "\n" not in str(caught.value).replace("\n  Try: ", "", 1)


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(DataError, match=r"train_bpe: must be at least 257 \(256 bytes and end-of-text\)\. Found 256"):
        build_tokenizer("bpe", corpus(WORDS), 256)


def test_gpt2_without_network_says_how_to_give_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken

    def offline(name: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(
        DataError,
        match=r"download failed \(ConnectionError\)\.\n  Try: a folder with vocab.bpe and encoder.json",
    ):
        build_tokenizer("gpt2", corpus(WORDS))
