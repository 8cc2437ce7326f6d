"""Tokenizers for bytes, characters, GPT-2, a trained BPE and any tokenizer.json.

Special tokens in a text are encoded as plain text: `<|endoftext|>` in a document never becomes the end-of-text id. A saved
tokenizer is two JSON files, `tokenizer.json` and `gptoughts_tokenizer.json`.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from gptoughts.data.text.rows import first_line
from gptoughts.data.text.sample import cut_anywhere, first_characters, spread_sample
from gptoughts.data.text.sources import Source
from gptoughts.data.tokenizers import bpe
from gptoughts.data.tokenizers.spec import (
    MAX_TOKENIZER_BYTES,
    library_errors,
    load_library,
    names_of,
    read_characters,
    read_spec,
)
from gptoughts.data.tokenizers.stream import StreamDecoder
from gptoughts.errors import DataError, nearest
from gptoughts.files import load_json, read_limited

CARD = "gptoughts_tokenizer.json"
END_OF_TEXT_NAMES = (
    "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|eot_id|>", "<|im_end|>", "<｜end▁of▁sentence｜>", "[SEP]",
)  # fmt: skip
BPE_SAMPLE_CHARACTERS = 50_000_000
IDENTITY_SAMPLE_CHARACTERS = 1_000_000
SAFE_CUT = re.compile(r"(?<=\S)(?= [A-Za-z])")  # GPT-2's pattern never matches across this boundary.


class Tokenizer(ABC):
    """Base class. `eot_id` is the end-of-text id; ids are below `vocab_size`; `canonical` is the content of tokenizer.json."""

    kind: str
    vocab_size: int
    eot_id: int
    engine: str = "numpy"
    canonical: bytes

    @property
    def hash(self) -> str:
        """sha256 of `canonical`; equal hashes mean equal ids."""
        return hashlib.sha256(self.canonical).hexdigest()

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint16 if every id fits, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 65536 else np.uint32)

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, in `dtype`, without end-of-text."""

    @abstractmethod
    def token_bytes(self, index: int) -> bytes | None:
        """Return the bytes of a token; empty for end-of-text and unknown ids, None if the tokens are not bytes."""

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of one text, in `dtype`."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode `ids`; end-of-text becomes an empty string, bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(int(index)) or b"" for index in ids).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        """Return an incremental decoder."""
        return StreamDecoder(self)

    def cut(self, text: str, characters: int) -> Iterator[str]:
        """Cut a text into parts of about `characters` whose joined ids equal those of the whole; one part if that is not guaranteed."""
        yield text

    def accelerate(self, sample: Sequence[str]) -> None:  # noqa: B027
        """Switch to a faster engine if it gives the same ids on `sample`."""

    def card(self) -> dict[str, Any]:
        """Return the contents of `gptoughts_tokenizer.json`."""
        content = {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "eot_id": self.eot_id,
            "hash": self.hash,
            "engine": self.engine,
        }
        return {"format": "gptoughts-tokenizer", "version": 1, **content}

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `gptoughts_tokenizer.json` into `folder`, created if missing."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_bytes(self.canonical)
        (folder / CARD).write_text(json.dumps(self.card(), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Tokenizer:
        """Load a tokenizer written by `save`. Raises DataError where a file is missing or changed."""
        try:
            card = load_json(folder / CARD)
            raw = read_limited(folder / "tokenizer.json", MAX_TOKENIZER_BYTES)
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: not a saved tokenizer ({first_line(error)})") from None
        found = hashlib.sha256(raw).hexdigest()
        if not isinstance(card, dict) or card.get("hash") != found:
            problem = f"{folder / 'tokenizer.json'}: changed since it was saved (sha256 differs from {CARD})"
            raise DataError(problem, found=found[:12])
        kind = card.get("kind")
        if kind == "bytes":
            return ByteTokenizer()
        if kind == "chars":
            return CharacterTokenizer(read_characters(raw, str(folder / "tokenizer.json")))
        tokenizer = JsonTokenizer(raw, str(kind), str(folder / "tokenizer.json"))
        if card.get("engine") == "tiktoken":
            tokenizer.encoding = bpe.tiktoken_encoding(tokenizer.spec, tokenizer.eot_id)
            tokenizer.engine = "tiktoken" if tokenizer.encoding else "tokenizers"
        return tokenizer


class ByteTokenizer(Tokenizer):
    """Tokenizer with the 256 bytes of UTF-8 and end-of-text as id 256."""

    kind = "bytes"
    vocab_size = 257
    eot_id = 256
    canonical = b'{"format": "gptoughts-bytes", "version": 1}\n'

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16) for text in texts]

    def token_bytes(self, index: int) -> bytes:
        return bytes([index]) if 0 <= index < 256 else b""

    def cut(self, text: str, characters: int) -> Iterator[str]:
        return cut_anywhere(text, characters)


class CharacterTokenizer(Tokenizer):
    """Tokenizer with the characters of a corpus in code point order, and end-of-text as the last id."""

    kind = "chars"

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.eot_id = len(self.characters)
        self.vocab_size = self.eot_id + 1
        content = {"format": "gptoughts-chars", "version": 1, "characters": self.characters}
        self.canonical = (json.dumps(content) + "\n").encode()
        points = np.array([ord(character) for character in self.characters], dtype=np.int64)
        # One entry more than the highest code point, marked unknown, for every character above it.
        self.table = np.full(int(points.max(initial=0)) + 2, self.vocab_size, dtype=np.uint32)
        self.table[points] = np.arange(self.eot_id, dtype=np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids = self.table[np.minimum(points, len(self.table) - 1)]
        if ids.max(initial=0) == self.vocab_size:
            unknown = text[int((ids == self.vocab_size).argmax())]
            raise DataError(
                f"character {unknown!r} (U+{ord(unknown):04X}) is not among the tokenizer's {self.eot_id} characters"
            )
        return ids.astype(self.dtype)

    def token_bytes(self, index: int) -> bytes:
        return self.characters[index].encode("utf-8") if 0 <= index < self.eot_id else b""

    def cut(self, text: str, characters: int) -> Iterator[str]:
        return cut_anywhere(text, characters)


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` of the tokenizers library; `accelerate` uses tiktoken for byte-level BPE if the ids are identical."""

    engine = "tokenizers"

    def __init__(self, raw: bytes, kind: str, origin: str) -> None:
        self.kind, self.canonical, self.origin = kind, raw, origin
        self.spec = read_spec(raw, origin)
        vocab, added = names_of(self.spec)
        self.vocab_size = max([*vocab.values(), *added.values()], default=-1) + 1
        eot = next((table[name] for table in (added, vocab) for name in END_OF_TEXT_NAMES if name in table), None)
        if eot is None:
            raise DataError(f"{origin}: no end-of-text token", fix=f"add one of {', '.join(END_OF_TEXT_NAMES)}")
        self.eot_id = int(eot)
        self.encoding: Any = None
        self._library: Any = None
        self._bytes = self._byte_table(vocab, added) if (self.spec.get("decoder") or {}).get("type") == "ByteLevel" else None

    @staticmethod
    def _byte_table(vocab: dict[str, int], added: dict[str, int]) -> dict[int, bytes]:
        """Return id -> bytes for a byte-level vocabulary; added tokens are UTF-8 text."""
        byte = bpe.byte_of_character()
        table = {
            index: bytes(byte[char] for char in name) if all(char in byte for char in name) else name.encode()
            for name, index in vocab.items()
        }
        return table | {index: name.encode() for name, index in added.items()}

    @property
    def library(self) -> Any:
        """The tokenizers library's object, set to encode special tokens in a text as text."""
        if self._library is None:
            spec = dict(self.spec, truncation=None, padding=None)
            spec["added_tokens"] = [
                dict(token, special=bool(token.get("special")) or token["id"] == self.eot_id)
                for token in spec.get("added_tokens") or []
            ]
            self._library = load_library(spec, self.origin)
            self._library.encode_special_tokens = True
        return self._library

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self.encoding is not None:
            # With no special token allowed and none disallowed, tiktoken encodes all of them as plain text.
            with suppress(
                ValueError
            ):  # Its pattern backtracks: a million blanks exceed its stack, and not that of the library.
                return [self.encoding.encode_to_numpy(text, disallowed_special=()).astype(self.dtype) for text in texts]
        library = self.library
        with library_errors(self.origin):
            encoded = library.encode_batch_fast(list(texts), add_special_tokens=False)
        batch = [np.array(one.ids, dtype=np.uint32).astype(self.dtype) for one in encoded]
        # A Unigram or WordLevel model can match the end-of-text token in a text as an ordinary piece.
        return [self._without_eot(text) if (ids == self.eot_id).any() else ids for text, ids in zip(texts, batch, strict=True)]

    def _without_eot(self, text: str) -> np.ndarray:
        """Return the ids of a text that contains the end-of-text token as text, by cutting each occurrence after its first character."""
        name = next(name for name, index in self.library.get_vocab().items() if index == self.eot_id)
        parts = text.replace(name, name[0] + "\0" + name[1:]).split("\0") if "\0" not in text else [text]
        with library_errors(self.origin):
            encoded = self.library.encode_batch_fast(parts, add_special_tokens=False)
        ids = np.array([index for one in encoded for index in one.ids], dtype=np.uint32).astype(self.dtype)
        if (ids == self.eot_id).any():
            problem = f"the text contains the end-of-text token {name!r}, which {self.origin} cannot encode as text"
            raise DataError(problem, fix="remove it from the text")
        return ids

    def accelerate(self, sample: Sequence[str]) -> None:
        encoding = bpe.tiktoken_encoding(self.spec, self.eot_id)
        if encoding is None or self.encoding is not None:
            return
        if all(
            encoding.encode_ordinary(text) == ids.tolist() for text, ids in zip(sample, self.encode_batch(sample), strict=True)
        ):
            self.encoding, self.engine = encoding, "tiktoken"

    def token_bytes(self, index: int) -> bytes | None:
        if self._bytes is None:
            return None
        return b"" if index == self.eot_id else self._bytes.get(index, b"")

    def decode(self, ids: Iterable[int]) -> str:
        if self._bytes is not None:
            return super().decode(ids)
        known = [int(index) for index in ids if 0 <= index < self.vocab_size and index != self.eot_id]
        library = self.library
        with library_errors(self.origin):
            return str(library.decode(known, skip_special_tokens=False))

    def cut(self, text: str, characters: int) -> Iterator[str]:
        if not bpe.splits_like_gpt2(self.spec) or any(
            not token.get("special") for token in self.spec.get("added_tokens") or []
        ):
            yield text
            return
        start = 0
        while match := SAFE_CUT.search(text, start + characters):
            yield text[start : match.start()]
            start = match.start()
        yield text[start:]


def build_tokenizer(name: str, source: Source, train_bpe: int | None = None) -> Tokenizer:
    """Build the tokenizer `name`: bytes, chars, gpt2, bpe, a tokenizer.json, or a folder with GPT-2's or saved files.

    `chars` and `bpe` read the corpus. Byte-level BPE runs on tiktoken if a sample of the corpus gives identical ids.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "chars":
        return CharacterTokenizer("".join(sorted(set().union(*(document.text for document in source.documents())))))
    if name == "bpe":
        if train_bpe is None:
            raise DataError("tokenizer 'bpe': needs a vocabulary size", fix="--train-bpe 4096, or --data.train-bpe 4096")
        spec = bpe.train(spread_sample(source, BPE_SAMPLE_CHARACTERS), train_bpe)
        tokenizer: Tokenizer = JsonTokenizer(json.dumps(spec, ensure_ascii=False).encode(), "bpe", "trained BPE")
    else:
        tokenizer = load_tokenizer(name)
    tokenizer.accelerate(first_characters(source, IDENTITY_SAMPLE_CHARACTERS))
    return tokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """Load GPT-2's tokenizer through tiktoken, or a tokenizer from the file or folder `name`."""
    if name == "gpt2":
        return JsonTokenizer(json.dumps(bpe.gpt2_from_tiktoken(), ensure_ascii=False).encode(), "gpt2", "gpt2")
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / CARD).exists():
            return Tokenizer.load(path)
        if (path / "tokenizer.json").exists():
            path = path / "tokenizer.json"
        elif spec := bpe.gpt2_from_folder(path):
            return JsonTokenizer(json.dumps(spec, ensure_ascii=False).encode(), "gpt2", name)
        else:
            files = "tokenizer.json, vocab.bpe + encoder.json, or merges.txt + vocab.json"
            raise DataError(f"tokenizer {name!r}: the folder must hold {files}")
    if not path.is_file():
        known = ("bytes", "chars", "gpt2", "bpe")
        raise DataError(f"tokenizer {name!r}: not bytes, chars, gpt2 or bpe, and no such file{nearest(name, known)}")
    try:
        return JsonTokenizer(read_limited(path, MAX_TOKENIZER_BYTES), "file", name)
    except (OSError, ValueError) as error:
        raise DataError(f"tokenizer {name!r}: cannot be read ({first_line(error)})") from None
