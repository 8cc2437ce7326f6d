"""Byte-level BPE: training, GPT-2's files, and tiktoken as an engine, which is three times as fast.

`spec` is always the content of a `tokenizer.json` of the tokenizers library, as a dictionary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gptoughts.data.text.rows import first_line, require
from gptoughts.errors import DataError
from gptoughts.files import load_json

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # 256 bytes and the end-of-text token.
GPT2_FILES = (("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json"))
BYTE_LEVEL: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

MAX_WORD = 1000
"""Characters of a word in BPE training, which takes quadratic time in the length of one."""
LONG_WORD = re.compile(
    rf"(?<![^\W\d_])[^\W\d_]{{{MAX_WORD},}}|(?<!\d)\d{{{MAX_WORD},}}|(?<!\s)\s{{{MAX_WORD},}}|(?<![^\s\w])[^\s\w]{{{MAX_WORD},}}|(?<!_)_{{{MAX_WORD},}}"
)
"""A run of letters, digits, white space or other characters, which GPT-2's pattern keeps as one word."""


def byte_of_character() -> dict[str, int]:
    """Return printable character -> byte: the inverse of GPT-2's table (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    characters = [*map(chr, printable), *(chr(256 + index) for index in range(len(others)))]
    return dict(zip(characters, [*printable, *others], strict=True))


def train(texts: Iterable[str], vocab_size: int) -> dict[str, Any]:
    """Train a byte-level BPE with GPT-2's split pattern; deterministic for the same texts.

    Longer words than `MAX_WORD` are cut. The end-of-text token is id 0 and counts in `vocab_size`. A small text can give fewer ids.
    Raises DataError for a vocabulary that cannot hold the 256 bytes.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(f"train_bpe: must be at least {MIN_VOCAB_SIZE} (256 bytes and end-of-text)", found=vocab_size)
    require("tokenizers", "train", "training a BPE")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # The library returns them in hash-map order.
        show_progress=False,
    )
    tokenizer.train_from_iterator((part for text in texts for part in cut_words(text)), trainer)
    return json.loads(tokenizer.to_str())


def cut_words(text: str) -> Iterator[str]:
    """Yield the text in parts, cut only inside words of `MAX_WORD` characters and more (DNA, one long line of blanks)."""
    done = 0
    for match in LONG_WORD.finditer(text):
        for cut in range(match.start() + MAX_WORD, match.end(), MAX_WORD):
            yield text[done:cut]
            done = cut
    yield text[done:]


def gpt2_from_folder(folder: Path) -> dict[str, Any] | None:
    """Read GPT-2's vocab.bpe and encoder.json, or merges.txt and vocab.json; return None where the folder has neither pair."""
    for merges_name, vocab_name in GPT2_FILES:
        merges_file, vocab_file = folder / merges_name, folder / vocab_name
        if merges_file.exists() and vocab_file.exists():
            try:
                vocab = load_json(vocab_file)
                lines = merges_file.read_text(encoding="utf-8").split("\n")
            except ValueError as error:
                raise DataError(f"{folder}: {vocab_name} or {merges_name} cannot be read ({first_line(error)})") from None
            merges = [line.rstrip("\r").split(" ") for line in lines if line.strip() and not line.startswith("#version")]
            if not isinstance(vocab, dict) or any(len(merge) != 2 for merge in merges):
                raise DataError(f"{merges_file}: not a list of merges, two tokens per line", fix="GPT-2's published files")
            if END_OF_TEXT not in vocab:
                raise DataError(f"{vocab_file}: no {END_OF_TEXT}", fix="GPT-2's published files")
            return spec_of(vocab, merges)
    return None


def gpt2_from_tiktoken() -> dict[str, Any]:
    """Read GPT-2's tokenizer from tiktoken's cache; tiktoken downloads it on first use."""
    require("tiktoken", "train", "tokenizer gpt2")
    import tiktoken

    try:
        ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    except Exception as error:  # requests, urllib3, ssl and the cache's file errors have no common type.
        raise DataError(
            f"tokenizer 'gpt2': not in tiktoken's cache, and the download failed ({type(error).__name__})",
            fix="a folder with vocab.bpe and encoder.json (or merges.txt and vocab.json) as the tokenizer",
        ) from None
    character_of_byte = {byte: character for character, byte in byte_of_character().items()}

    def to_text(token: bytes) -> str:
        return "".join(character_of_byte[byte] for byte in token)

    merges = [[to_text(left), to_text(right)] for left, right in merges_of(ranks)]
    return spec_of({to_text(token): rank for token, rank in ranks.items()} | {END_OF_TEXT: len(ranks)}, merges)


def merges_of(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the merges behind tiktoken's ranks: the last merge of each token, using only tokens of lower rank."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joins = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
            best = min(range(len(joins)), key=joins.__getitem__)
            if joins[best] >= rank:
                raise DataError(f"tiktoken's GPT-2 file: no merge gives token {token!r}", fix="delete tiktoken's cache")
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def spec_of(vocab: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    """Build a tokenizer.json like GPT-2's from vocabulary and merges."""
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[END_OF_TEXT], "content": END_OF_TEXT, **special}],
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": merges,
        },
    }


def splits_like_gpt2(spec: dict[str, Any]) -> bool:
    """Whether text is split by GPT-2's pattern and not changed otherwise before the merges."""
    split = spec.get("pre_tokenizer") or {}
    return (
        spec.get("normalizer") is None
        and split.get("type") == "ByteLevel"
        and split.get("add_prefix_space") is False
        and split.get("use_regex", True) is True
        and spec["model"].get("type") == "BPE"
    )


def tiktoken_ranks(spec: dict[str, Any], eot_id: int) -> dict[bytes, int] | None:
    """Return token bytes -> id if this tokenizer follows tiktoken's merge rule (lowest id first), else None."""
    model, added = spec["model"], spec.get("added_tokens") or []
    plain = not any(
        model.get(key) for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    if not splits_like_gpt2(spec) or not plain or not all(token.get("special") for token in added):
        return None
    byte = byte_of_character()
    vocab: dict[str, int] = model["vocab"]
    names = {token["content"] for token in added}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    results = [vocab.get("".join(pair), -1) for pair in pairs]
    tokens = {name: index for name, index in vocab.items() if name not in names}
    if any(char not in byte for name in tokens for char in name) or not all(char in tokens for char in byte):
        return None
    if eot_id in tokens.values() or len(set(tokens.values())) < len(tokens):
        return None  # two names of one id
    in_order = all(earlier < later for earlier, later in zip([-1, *results], results, strict=False))
    if not in_order or set(results) != {index for name, index in tokens.items() if len(name) > 1}:
        return None
    return {bytes(byte[char] for char in name): index for name, index in tokens.items()}


def tiktoken_encoding(spec: dict[str, Any], eot_id: int) -> Any | None:
    """Return a `tiktoken.Encoding` with this tokenizer's ids, or None if its merge rules differ."""
    ranks = tiktoken_ranks(spec, eot_id)
    if ranks is None:
        return None
    require("tiktoken", "train", "a byte-level BPE")
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    return tiktoken.Encoding("gptoughts", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: eot_id})
