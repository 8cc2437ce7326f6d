"""Rendered chat becomes ids: special tokens that the template wrote are those tokens, special tokens that a message spells are text.

Inside, the control tokens go by names that no text can spell, so the tokenizers library itself has no way to confuse the two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gptoughts.data.chat import template as marks
from gptoughts.data.chat.template import ALIAS, BEGIN_TEXT, END_TEXT, Message, Template, load_template, special_names
from gptoughts.data.text.sources import first_line, require
from gptoughts.data.tokenizers.tokenizer import JsonTokenizer, Tokenizer, bpe_from_files
from gptoughts.errors import DataError

PROBED_TOKENS = 64


@dataclass(frozen=True)
class Encoded:
    """The ids of one rendered text, and which of them lie, at least in part, in what the model shall say (bool, same shape)."""

    ids: np.ndarray
    learned: np.ndarray


@dataclass(frozen=True)
class Piece:
    """Text for the library, of which the first `learned` characters are learned; `onwards`: it goes on in the middle of a text."""

    text: str
    learned: int
    onwards: bool


class ChatTokenizer:
    """A `tokenizer.json` with a chat template.

    `control` are the tokens that only the template may write (name -> id): those marked special, end-of-text, and others that
    the template's own text holds, which in answers are allowed to everyone (`<think>`).
    """

    def __init__(self, tokenizer: JsonTokenizer, template: Template) -> None:
        self.tokenizer, self.template = tokenizer, template
        added = {token["content"]: token for token in tokenizer.spec.get("added_tokens") or []}
        self.special = {
            name: int(token["id"]) for name, token in added.items() if token.get("special") or token["id"] == tokenizer.eot_id
        }
        if tokenizer.eot_id not in self.special.values():
            self.special[name_of(tokenizer, tokenizer.eot_id)] = tokenizer.eot_id
        written = {name: int(token["id"]) for name, token in added.items() if name in template.literals}
        self.control = self.special | written
        self._special_pattern, self._control_pattern = alternatives(self.special), alternatives(self.control)
        self._scan = re.compile(
            f"{BEGIN_TEXT}(?P<text>{self._control_pattern.pattern}){END_TEXT}|[{BEGIN_TEXT}{END_TEXT}]"
            f"|(?P<begin>{marks.BEGIN_ANSWER})|(?P<end>{marks.END_ANSWER})|(?P<control>{self._control_pattern.pattern})"
        )
        self._endings = tuple(self.control)

    @cached_property
    def library(self) -> Any:
        """The library's object, in which control tokens go by their aliases. Raises DataError where that changes what they are."""
        library = aliased(self.tokenizer, self.control)
        names = sorted(self.control, key=lambda name: self.control[name])[:PROBED_TOKENS]
        probe = "a b\n".join(["One two", *(f"{name}{name} x" for name in names), "\n\nlast"])
        plain = self.tokenizer.library
        plain.encode_special_tokens = False
        expected = plain.encode(probe, add_special_tokens=False).ids
        plain.encode_special_tokens = True
        if expected != library.encode("".join(piece.text for piece in self._pieces(probe)), add_special_tokens=False).ids:
            raise DataError(f"{self.tokenizer.origin}: its special tokens cannot be told from text that spells them")
        return library

    @staticmethod
    def open(tokenizer: Tokenizer | Path | str, template: str | None = None, today: datetime | None = None) -> ChatTokenizer:
        """The tokenizer in a folder (or a `tokenizer.json`), with the template that `data.template` asks for. Raises DataError."""
        folder = Path(".")
        if not isinstance(tokenizer, Tokenizer):
            place = Path(tokenizer).expanduser()
            folder = place if place.is_dir() else place.parent
            tokenizer = bpe_from_files(str(tokenizer))
        elif template is None:
            raise DataError(
                "a tokenizer without its folder has no chat template; type: --data.template plain (or chatml, or a file)"
            )
        if not isinstance(tokenizer, JsonTokenizer):
            raise DataError(f"data.tokenizer {tokenizer.kind}: chat needs special tokens; give a folder with a tokenizer.json")
        names = special_names(folder)
        names.setdefault("eos_token", name_of(tokenizer, tokenizer.eot_id))
        loaded = load_template(template, folder, names, today)
        chat = ChatTokenizer(tokenizer, loaded)
        lacking = [token for token in marks.NEEDED_TOKENS.get(template or "", ()) if token not in chat.control]
        if lacking:
            raise DataError(
                f"data.template {template}: the tokenizer has no {' and no '.join(lacking)}; type: --data.template plain "
                f"(turns end with {names['eos_token']}), or name a Jinja file with tokens that it has"
            )
        return chat

    def protected(self, messages: Sequence[Message]) -> tuple[list[dict[str, Any]], int]:
        """The messages with marks around every control token that they spell, and how many there are.

        Answers may hold control tokens that are not special, such as `<think>`; nobody else's text may. Raises DataError for the
        few code points that serve as marks.
        """
        spelled = 0

        def marked(value: Any, pattern: re.Pattern[str]) -> Any:
            nonlocal spelled
            if isinstance(value, str):
                if any(mark in value for mark in marks.RESERVED):
                    raise DataError("holds a Unicode noncharacter (U+FDD0 to U+FDD5), which no text may; remove it")
                value, count = pattern.subn(f"{BEGIN_TEXT}\\g<0>{END_TEXT}", value)
                spelled += count
            elif isinstance(value, list):
                return [marked(part, pattern) for part in value]
            elif isinstance(value, dict):
                return {key: marked(part, pattern) for key, part in value.items()}
            return value

        out = []
        for message in messages:
            pattern = self._special_pattern if message["role"] == "assistant" else self._control_pattern
            out.append({key: value if key == "role" else marked(value, pattern) for key, value in message.items()})
        return out, spelled

    def closing(self, answer: str) -> int:
        """Where an answer ends in what the template wrote for it: behind its end-of-turn token; -1 where there is none."""
        text = answer.rstrip()
        # One that a message only spells ends in a mark.
        return len(text) if text.endswith(self._endings) else -1

    def opening(self, text: str) -> str:
        """The control token that `text` begins with; empty where it begins with none."""
        match = self._control_pattern.match(text)
        return match[0] if match else ""

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """The ids of rendered texts with their marks. No token is added: a text has the begin-of-text tokens that its template wrote.

        No token reaches over the beginning of an answer: what stands before it has the ids that it has as a prompt.
        """
        plans = [self._pieces(text) for text in texts]
        pieces = [piece for plan in plans for piece in plan]
        found: dict[bool, Iterator[Any]] = {}
        for onwards in {piece.onwards for piece in pieces}:
            library = self.continuing if onwards else self.library
            some = [piece.text for piece in pieces if piece.onwards == onwards]
            found[onwards] = iter(library.encode_batch(some, add_special_tokens=False))
        out = []
        for plan in plans:
            ids, learned = [np.empty(0, dtype=np.uint32)], [np.empty(0, dtype=bool)]
            for piece in plan:
                encoding = next(found[piece.onwards])
                ids.append(np.array(encoding.ids, dtype=np.uint32))
                learned.append(np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 0] < piece.learned)
            out.append(Encoded(np.concatenate(ids).astype(self.tokenizer.dtype), np.concatenate(learned)))
        return out

    @cached_property
    def continuing(self) -> Any:
        """The library's object for text that goes on: it puts no space in front, as those of SentencePiece's manners do. None
        where the usual one puts none, either."""
        spec = self.tokenizer.spec
        parts = {name: unprefixed(spec.get(name)) for name in ("normalizer", "pre_tokenizer")}
        return (
            None
            if all(spec.get(name) == part for name, part in parts.items())
            else aliased(self.tokenizer, self.control, parts)
        )

    def _pieces(self, text: str) -> list[Piece]:
        """A rendered text as the library gets it, control tokens under their aliases, cut where answers begin."""
        pieces: list[Piece] = []
        written, learned, done = "", 0, 0
        for match in self._scan.finditer(text):
            written += text[done : match.start()]
            done = match.end()
            if match["control"] is not None:
                written += alias(self.control[match["control"]])
            elif match["text"] is not None:
                written += match["text"]
            elif match["begin"] is not None:
                pieces += self._cut(written, learned, bool(pieces))
                written, learned = "", 0
            elif match["end"] is not None:
                learned = len(written)
        return pieces + self._cut(written + text[done:], learned, bool(pieces))

    def _cut(self, text: str, learned: int, onwards: bool) -> list[Piece]:
        """A piece, in two where the library must be told that it goes on, which matters up to the first control token."""
        cut = 0
        if onwards and self.continuing is not None:
            cut = text.find(ALIAS[0]) if ALIAS[0] in text else len(text)
        both = Piece(text[:cut], learned, True), Piece(text[cut:], learned - cut, False)
        return [piece for piece in both if piece.text]


def alternatives(names: Mapping[str, int]) -> re.Pattern[str]:
    """A pattern for any of the names; of two that begin alike the longer one. Matches nothing where there is no name."""
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)")


def alias(index: int) -> str:
    """The name that a control token goes by."""
    return f"{ALIAS[0]}{index}{ALIAS[1]}"


def name_of(tokenizer: JsonTokenizer, index: int) -> str:
    """The token with this id, as it is written."""
    added = {int(token["id"]): str(token["content"]) for token in tokenizer.spec.get("added_tokens") or []}
    vocab = tokenizer.spec["model"]["vocab"]
    if index in added:
        return added[index]
    return str(vocab[index][0]) if isinstance(vocab, list) else next(name for name, number in vocab.items() if number == index)


def unprefixed(part: Any) -> Any:
    """A normalizer or pre-tokenizer that puts nothing in front of a text."""
    if not isinstance(part, dict):
        return part
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            return dict(part, **{name: [unprefixed(one) for one in part[name] if one.get("type") != "Prepend"]})
    if part.get("type") == "Prepend":
        return None
    if part.get("type") == "Metaspace":
        kept = {key: value for key, value in part.items() if key != "add_prefix_space"}
        return part if part.get("prepend_scheme") == "never" else dict(kept, prepend_scheme="never")
    return dict(part, add_prefix_space=False) if part.get("add_prefix_space") else part


def aliased(tokenizer: JsonTokenizer, control: Mapping[str, int], changes: Mapping[str, Any] | None = None) -> Any:
    """The library's tokenizer, with other parts where `changes` has them, in which control tokens have no name but their alias."""
    spec = dict(tokenizer.spec, **(changes or {}), truncation=None, padding=None, post_processor=None)
    known = {token["content"] for token in spec.get("added_tokens") or []}
    spec["added_tokens"] = [
        dict(token, content=alias(control[token["content"]]), special=True) if token["content"] in control else token
        for token in spec.get("added_tokens") or []
    ] + [
        {
            "id": index,
            "content": alias(index),
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for name, index in control.items()
        if name not in known
    ]
    spec["model"] = model = dict(spec["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [[alias(control[name]) if name in control else name, *rest] for name, *rest in model["vocab"]]
    else:
        model["vocab"] = {alias(index) if name in control else name: index for name, index in model["vocab"].items()}
    if model.get("unk_token") in control:
        model["unk_token"] = alias(control[model["unk_token"]])
    if "merges" in model:
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        # A merge that spells a control token would build it out of text.
        keep = [pair[0] not in control and pair[1] not in control and pair[0] + pair[1] not in control for pair in pairs]
        model["merges"] = [merge for merge, kept in zip(model["merges"], keep, strict=True) if kept]
    library = library_of(spec, tokenizer.origin)
    if any(library.token_to_id(alias(index)) != index for index in control.values()):
        raise DataError(f"{tokenizer.origin}: its added tokens have other ids than it says")
    return library


def library_of(spec: Mapping[str, Any], origin: str) -> Any:
    """The tokenizers library's object for a specification."""
    require("tokenizers", "train", origin)
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # The library raises bare Exception.
        raise DataError(f"{origin}: the tokenizers library cannot load it ({first_line(error)})") from None
