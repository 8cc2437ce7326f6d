"""Byte-level BPE: trained on a text, read from GPT-2's files, and run by tiktoken where that gives the same ids three times as fast.

Everything here speaks the tokenizers library's `tokenizer.json`, as a dictionary called `spec`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gptoughts.data.text.sources import first_line, require
from gptoughts.errors import DataError

END_OF_TEXT = "<|endoftext|>"
LEAST_VOCABULARY = 257  # 256 bytes and the end-of-text token.
GPT2_FILES = (("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json"))
BYTE_LEVEL: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, read backwards (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    characters = [*map(chr, printable), *(chr(256 + index) for index in range(len(others)))]
    return dict(zip(characters, [*printable, *others], strict=True))


def train(texts: Iterable[str], vocab_size: int) -> dict[str, Any]:
    """A byte-level BPE with GPT-2's split pattern, learned from `texts`; the same texts give the same bytes every time.

    The end-of-text token is id 0 and counts in `vocab_size`. A small text may give fewer ids than asked for.
    Raises DataError for a vocabulary that cannot hold the 256 bytes.
    """
    if vocab_size < LEAST_VOCABULARY:
        raise DataError(
            f"train_bpe = {vocab_size}: a byte-level BPE needs at least {LEAST_VOCABULARY} (256 bytes and end-of-text)"
        )
    require("tokenizers", "train", "training a BPE")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # The library's own order is that of a hash map.
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return json.loads(tokenizer.to_str())


def gpt2_from_folder(folder: Path) -> dict[str, Any] | None:
    """GPT-2's tokenizer from vocab.bpe and encoder.json, or merges.txt and vocab.json; None where the folder has neither pair."""
    for merges_name, vocab_name in GPT2_FILES:
        merges_file, vocab_file = folder / merges_name, folder / vocab_name
        if merges_file.exists() and vocab_file.exists():
            try:
                vocab = json.loads(vocab_file.read_text(encoding="utf-8"))
                lines = merges_file.read_text(encoding="utf-8").split("\n")
            except ValueError as error:
                raise DataError(f"{folder}: {vocab_name} or {merges_name} cannot be read ({first_line(error)})") from None
            merges = [line.rstrip("\r").split(" ") for line in lines if line.strip() and not line.startswith("#version")]
            if not isinstance(vocab, dict) or any(len(merge) != 2 for merge in merges):
                raise DataError(
                    f"{merges_file}: not a list of merges, two tokens a line; give the files that GPT-2 was published with"
                )
            if END_OF_TEXT not in vocab:
                raise DataError(f"{vocab_file}: no {END_OF_TEXT}; give the files that GPT-2 was published with")
            return spec_of(vocab, merges)
    return None


def gpt2_from_tiktoken() -> dict[str, Any]:
    """GPT-2's tokenizer out of tiktoken's cache, which tiktoken fills from the network the first time."""
    require("tiktoken", "train", "tokenizer gpt2")
    import tiktoken

    try:
        ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    except Exception as error:  # requests, urllib3, ssl and the cache's file errors have no common type.
        raise DataError(
            f"tokenizer 'gpt2': not in tiktoken's cache, and the network gave no files ({type(error).__name__}); "
            f"put vocab.bpe and encoder.json (or merges.txt and vocab.json) in a folder and name that folder as the tokenizer"
        ) from None
    character = {byte: sign for sign, byte in byte_of_character().items()}

    def written(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    merges = [[written(left), written(right)] for left, right in merges_of(ranks)]
    return spec_of({written(token): rank for token, rank in ranks.items()} | {END_OF_TEXT: len(ranks)}, merges)


def merges_of(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The merges behind tiktoken's ranks: each token's last join, when only earlier tokens may be used."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            joins = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
            best = min(range(len(joins)), key=joins.__getitem__)
            if joins[best] >= rank:
                raise DataError(f"tiktoken's GPT-2 file holds a token that no merge makes ({token!r}); delete its cache")
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def spec_of(vocab: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    """A tokenizer.json of GPT-2's kind from its two tables."""
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
    """Whether text is split by GPT-2's pattern and nothing else touches it before the merges."""
    split = spec.get("pre_tokenizer") or {}
    return (
        spec.get("normalizer") is None
        and split.get("type") == "ByteLevel"
        and split.get("add_prefix_space") is False
        and split.get("use_regex", True) is True
        and spec["model"].get("type") == "BPE"
    )


def tiktoken_ranks(spec: dict[str, Any]) -> dict[bytes, int] | None:
    """Token bytes to id where tiktoken's merge rule (lowest id first) is this tokenizer's rule too; None where it is not."""
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
    if any(sign not in byte for name in tokens for sign in name) or not all(sign in tokens for sign in byte):
        return None
    in_order = all(earlier < later for earlier, later in zip([-1, *results], results, strict=False))
    if not in_order or set(results) != {index for name, index in tokens.items() if len(name) > 1}:
        return None
    return {bytes(byte[sign] for sign in name): index for name, index in tokens.items()}


def tiktoken_encoding(spec: dict[str, Any], eot_id: int) -> Any | None:
    """A `tiktoken.Encoding` with this tokenizer's ids, or None where its rules differ from tiktoken's."""
    ranks = tiktoken_ranks(spec)
    if ranks is None:
        return None
    require("tiktoken", "train", "a byte-level BPE")
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    return tiktoken.Encoding("gptoughts", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: eot_id})
