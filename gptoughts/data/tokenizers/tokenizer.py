"""One `Tokenizer` for bytes, characters, GPT-2, a trained BPE and any tokenizer.json.

Text is always encoded as text: a document that spells `<|endoftext|>` never yields the end-of-text id. A saved tokenizer is
two JSON files, `tokenizer.json` and `gptoughts_tokenizer.json`, and no pickle.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptoughts.data.text.sample import first_characters, spread_sample
from gptoughts.data.text.sources import Source, first_line, require
from gptoughts.data.tokenizers import bpe
from gptoughts.errors import DataError, nearest

CARD = "gptoughts_tokenizer.json"
END_OF_TEXT_NAMES = (
    "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|eot_id|>", "<|im_end|>", "<｜end▁of▁sentence｜>", "[SEP]",
)  # fmt: skip
BPE_SAMPLE_CHARACTERS = 50_000_000
IDENTITY_SAMPLE_CHARACTERS = 1_000_000
SAFE_CUT = re.compile(r"(?<=\S)(?= [A-Za-z])")  # GPT-2's pattern never joins what lies on both sides of this place.


class Tokenizer(ABC):
    """Text to ids and back. `eot_id` is the end-of-text id; ids are below `vocab_size`; `hash` is the sha256 of `canonical`."""

    kind: str
    vocab_size: int
    eot_id: int
    engine: str = "numpy"
    canonical: bytes

    @property
    def hash(self) -> str:
        """sha256 of the tokenizer's canonical file: equal hashes mean equal ids."""
        return hashlib.sha256(self.canonical).hexdigest()

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint16 where every id fits, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 65536 else np.uint32)

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, in `dtype`; no end-of-text is added and none is read out of the text."""

    @abstractmethod
    def token_bytes(self, index: int) -> bytes | None:
        """The bytes that a token stands for; none for end-of-text and unknown ids. None where tokens are not bytes."""

    def encode(self, text: str) -> np.ndarray:
        """The ids of one text, in `dtype`."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. End-of-text reads as nothing; bytes that are not UTF-8 read as U+FFFD."""
        return b"".join(self.token_bytes(int(index)) or b"" for index in ids).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        """A decoder for ids that come one by one."""
        return StreamDecoder(self)

    def cut(self, text: str, characters: int) -> Iterator[str]:
        """Parts of about `characters` whose ids, joined, are the ids of the whole text; one part where that cannot be promised."""
        yield text

    def accelerate(self, sample: Sequence[str]) -> None:  # noqa: B027
        """Takes a faster engine where it gives the same ids on `sample`."""

    def card(self) -> dict[str, Any]:
        """What `gptoughts_tokenizer.json` says."""
        facts = {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "eot_id": self.eot_id,
            "hash": self.hash,
            "engine": self.engine,
        }
        return {"format": "gptoughts-tokenizer", "version": 1, **facts}

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` and `gptoughts_tokenizer.json` into `folder`, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_bytes(self.canonical)
        (folder / CARD).write_text(json.dumps(self.card(), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Tokenizer:
        """The tokenizer that `save` wrote. Raises DataError where files are missing, or the hash is another."""
        try:
            card = json.loads((folder / CARD).read_text(encoding="utf-8"))
            raw = (folder / "tokenizer.json").read_bytes()
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: not a saved tokenizer ({first_line(error)})") from None
        found = hashlib.sha256(raw).hexdigest()
        if not isinstance(card, dict) or card.get("hash") != found:
            raise DataError(
                f"{folder / 'tokenizer.json'}: changed since it was saved (sha256 {found[:12]} is not the one in {CARD})"
            )
        kind = card.get("kind")
        if kind == "bytes":
            return ByteTokenizer()
        if kind == "chars":
            return CharacterTokenizer(json.loads(raw)["characters"])
        tokenizer = JsonTokenizer(raw, str(kind), str(folder / "tokenizer.json"))
        if card.get("engine") == "tiktoken":
            tokenizer.encoding = bpe.tiktoken_encoding(tokenizer.spec, tokenizer.eot_id)
            tokenizer.engine = "tiktoken" if tokenizer.encoding else "tokenizers"
        return tokenizer


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and end-of-text as id 256."""

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
    """The characters of a corpus in code point order, and end-of-text after the last."""

    kind = "chars"

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.eot_id = len(self.characters)
        self.vocab_size = self.eot_id + 1
        content = {"format": "gptoughts-chars", "version": 1, "characters": self.characters}
        self.canonical = (json.dumps(content) + "\n").encode()
        points = np.array([ord(character) for character in self.characters], dtype=np.int64)
        # One entry more than the highest code point: every character above it lands on this last, unknown one.
        self.table = np.full(int(points.max(initial=0)) + 2, self.vocab_size, dtype=np.uint32)
        self.table[points] = np.arange(self.eot_id, dtype=np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids = self.table[np.minimum(points, len(self.table) - 1)]
        if ids.max(initial=0) == self.vocab_size:
            unknown = text[int((ids == self.vocab_size).argmax())]
            raise DataError(f"character {unknown!r} (U+{ord(unknown):04X}) is not one of the tokenizer's {self.eot_id}")
        return ids.astype(self.dtype)

    def token_bytes(self, index: int) -> bytes:
        return self.characters[index].encode("utf-8") if 0 <= index < self.eot_id else b""

    def cut(self, text: str, characters: int) -> Iterator[str]:
        return cut_anywhere(text, characters)


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` of the tokenizers library; `accelerate` hands byte-level BPE to tiktoken where the ids are identical."""

    engine = "tokenizers"

    def __init__(self, raw: bytes, kind: str, origin: str) -> None:
        self.kind, self.canonical, self.origin = kind, raw, origin
        try:
            self.spec: dict[str, Any] = json.loads(raw)
            model = self.spec["model"]
            vocab = model["vocab"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{origin}: not a tokenizer.json of the tokenizers library ({first_line(error)})") from None
        if isinstance(vocab, list):  # A Unigram model lists [token, score] pairs.
            vocab = {entry[0]: index for index, entry in enumerate(vocab)}
        added = {token["content"]: int(token["id"]) for token in self.spec.get("added_tokens") or []}
        self.vocab_size = max([*vocab.values(), *added.values()], default=-1) + 1
        eot = next((table[name] for table in (added, vocab) for name in END_OF_TEXT_NAMES if name in table), None)
        if eot is None:
            raise DataError(f"{origin}: cannot tell the end-of-text token; it needs one of {', '.join(END_OF_TEXT_NAMES)}")
        self.eot_id = int(eot)
        self.encoding: Any = None
        self._library: Any = None
        self._bytes = self._byte_table(vocab, added) if (self.spec.get("decoder") or {}).get("type") == "ByteLevel" else None

    @staticmethod
    def _byte_table(vocab: dict[str, int], added: dict[str, int]) -> dict[int, bytes]:
        """The bytes of every token of a byte-level vocabulary; added tokens are written out in UTF-8."""
        byte = bpe.byte_of_character()
        table = {
            index: bytes(byte[sign] for sign in name) if all(sign in byte for sign in name) else name.encode()
            for name, index in vocab.items()
        }
        return table | {index: name.encode() for name, index in added.items()}

    @property
    def library(self) -> Any:
        """The tokenizers library's object, in which special tokens found in a text stay text."""
        if self._library is None:
            require("tokenizers", "train", self.origin)
            import tokenizers

            spec = dict(self.spec, truncation=None, padding=None)
            spec["added_tokens"] = [
                dict(token, special=bool(token.get("special")) or token["id"] == self.eot_id)
                for token in spec.get("added_tokens") or []
            ]
            try:
                self._library = tokenizers.Tokenizer.from_str(json.dumps(spec))
            except Exception as error:  # The library raises bare Exception.
                raise DataError(f"{self.origin}: the tokenizers library cannot load it ({first_line(error)})") from None
            self._library.encode_special_tokens = True
        return self._library

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self.encoding is not None:
            # With no special token allowed and none forbidden, tiktoken reads them all as plain text.
            return [self.encoding.encode_to_numpy(text, disallowed_special=()).astype(self.dtype) for text in texts]
        encoded = self.library.encode_batch_fast(list(texts), add_special_tokens=False)
        batch = [np.array(one.ids, dtype=np.uint32).astype(self.dtype) for one in encoded]
        # A Unigram or WordLevel model can find the end-of-text token in the text by itself, as an ordinary piece.
        return [self._without_eot(text) if (ids == self.eot_id).any() else ids for text, ids in zip(texts, batch, strict=True)]

    def _without_eot(self, text: str) -> np.ndarray:
        """The ids of a text that spells the end-of-text token, which is cut after its first character wherever it stands."""
        name = next(name for name, index in self.library.get_vocab().items() if index == self.eot_id)
        parts = text.replace(name, name[0] + "\0" + name[1:]).split("\0") if "\0" not in text else [text]
        encoded = self.library.encode_batch_fast(parts, add_special_tokens=False)
        ids = np.array([index for one in encoded for index in one.ids], dtype=np.uint32).astype(self.dtype)
        if (ids == self.eot_id).any():
            raise DataError(
                f"the text spells the end-of-text token {name!r}, and {self.origin} cannot encode that as text; remove it"
            )
        return ids

    def accelerate(self, sample: Sequence[str]) -> None:
        encoding = bpe.tiktoken_encoding(self.spec, self.eot_id)
        if encoding is None or self.encoding is not None:
            return
        expected = self.encode_batch(sample)
        if all(encoding.encode_ordinary(text) == ids.tolist() for text, ids in zip(sample, expected, strict=True)):
            self.encoding, self.engine = encoding, "tiktoken"

    def token_bytes(self, index: int) -> bytes | None:
        if self._bytes is None:
            return None
        return b"" if index == self.eot_id else self._bytes.get(index, b"")

    def decode(self, ids: Iterable[int]) -> str:
        if self._bytes is not None:
            return super().decode(ids)
        known = [int(index) for index in ids if 0 <= index < self.vocab_size and index != self.eot_id]
        return self.library.decode(known, skip_special_tokens=False)

    def cut(self, text: str, characters: int) -> Iterator[str]:
        if not bpe.splits_like_gpt2(self.spec) or any(
            not token.get("special") for token in self.spec.get("added_tokens") or []
        ):
            yield text
            return
        start = 0
        while place := SAFE_CUT.search(text, start + characters):
            yield text[start : place.start()]
            start = place.start()
        yield text[start:]


def cut_anywhere(text: str, characters: int) -> Iterator[str]:
    """`text` in parts of `characters`; an empty text is one empty part."""
    return (text[start : start + characters] for start in range(0, max(len(text), 1), characters))


class StreamDecoder:
    """Ids in, text out; half of a UTF-8 character waits for its other half."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.ids: list[int] = []
        self.shown = 0

    def push(self, index: int) -> str:
        """The text that is certain after this id; often nothing."""
        raw = self.tokenizer.token_bytes(int(index))
        if raw is not None:
            return self.bytes.decode(raw)
        # Tokens that are not bytes: decode the last shown ids and the new ones together, as a word's first space depends on them.
        self.ids.append(int(index))
        before = self.tokenizer.decode(self.ids[: self.shown])
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}") or len(text) <= len(before):
            return ""
        self.ids, self.shown = self.ids[self.shown :], len(self.ids) - self.shown
        return text[len(before) :]

    def close(self) -> str:
        """The rest; a character that never got its other half reads as U+FFFD."""
        rest = self.bytes.decode(b"", final=True)
        text = self.tokenizer.decode(self.ids)[len(self.tokenizer.decode(self.ids[: self.shown])) :] if self.ids else ""
        self.ids, self.shown = [], 0
        return rest + text


def build_tokenizer(name: str, source: Source, train_bpe: int | None = None) -> Tokenizer:
    """The tokenizer that `name` asks for: bytes, chars, gpt2, bpe, a tokenizer.json, or a folder with GPT-2's or saved files.

    `chars` and `bpe` read the corpus. Byte-level BPE is handed to tiktoken where a sample of the corpus gives identical ids.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "chars":
        return CharacterTokenizer("".join(sorted(set().union(*(document.text for document in source.documents())))))
    if name == "bpe":
        if train_bpe is None:
            raise DataError("tokenizer 'bpe' needs the size of its vocabulary; type: --train-bpe 4096")
        spec = bpe.train(spread_sample(source, BPE_SAMPLE_CHARACTERS), train_bpe)
        tokenizer: Tokenizer = JsonTokenizer(json.dumps(spec, ensure_ascii=False).encode(), "bpe", "trained BPE")
    else:
        tokenizer = bpe_from_files(name)
    tokenizer.accelerate(first_characters(source, IDENTITY_SAMPLE_CHARACTERS))
    return tokenizer


def bpe_from_files(name: str) -> Tokenizer:
    """GPT-2 through tiktoken, or the tokenizer in the file or folder `name`."""
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
            raise DataError(
                f"tokenizer {name!r}: the folder has no tokenizer.json, no vocab.bpe + encoder.json, no merges.txt + vocab.json"
            )
    if not path.is_file():
        words = ("bytes", "chars", "gpt2", "bpe")
        raise DataError(f"tokenizer {name!r}: not bytes, chars, gpt2 or bpe, and no such file{nearest(name, words)}")
    return JsonTokenizer(path.read_bytes(), "file", name)
