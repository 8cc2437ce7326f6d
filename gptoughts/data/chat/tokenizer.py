"""Tokenize rendered chat: special tokens written by the template are encoded as such, those spelled in a message as plain text.

Control tokens are renamed to aliases that no text can contain, so the tokenizers library cannot confuse the two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gptoughts.data.chat.template import (
    ALIAS,
    BEGIN_ANSWER,
    BEGIN_TEXT,
    END_ANSWER,
    END_TEXT,
    NEEDED_TOKENS,
    RESERVED,
    Message,
    Template,
    load_template,
    special_token_names,
)
from gptoughts.data.tokenizers.spec import library_errors, load_library
from gptoughts.data.tokenizers.tokenizer import JsonTokenizer, Tokenizer, load_tokenizer
from gptoughts.errors import DataError

PROBED_TOKENS = 64


@dataclass(frozen=True)
class Encoded:
    """Token ids of one rendered text and their label mask: tokens that overlap text to train on (bool, same shape)."""

    ids: np.ndarray
    learned: np.ndarray


@dataclass(frozen=True)
class Piece:
    """Text for the library. `learned`: number of leading characters to train on; `continues`: not at the start of a text."""

    text: str
    learned: int
    continues: bool


class ChatTokenizer:
    """A `tokenizer.json` with a chat template.

    special   name -> id of tokens marked special, and end-of-text
    control   `special` and the added tokens in the template's own text, such as `<think>`, which answers may contain too
    """

    def __init__(self, tokenizer: JsonTokenizer, template: Template) -> None:
        self.tokenizer, self.template = tokenizer, template
        added = {token["content"]: token for token in tokenizer.spec.get("added_tokens") or []}
        self.special = {
            name: int(token["id"]) for name, token in added.items() if token.get("special") or token["id"] == tokenizer.eot_id
        }
        if tokenizer.eot_id not in self.special.values():
            self.special[token_name(tokenizer, tokenizer.eot_id)] = tokenizer.eot_id
        in_template = {name: int(token["id"]) for name, token in added.items() if name in template.literals}
        self.control = self.special | in_template
        self._special_pattern, self._control_pattern = any_of(self.special), any_of(self.control)
        self._scan = re.compile(
            f"{BEGIN_TEXT}(?P<text>{self._control_pattern.pattern}){END_TEXT}|[{BEGIN_TEXT}{END_TEXT}]"
            f"|(?P<begin>{BEGIN_ANSWER})|(?P<end>{END_ANSWER})|(?P<control>{self._control_pattern.pattern})"
        )
        self._endings = tuple(self.control)

    @cached_property
    def library(self) -> Any:
        """The library's tokenizer with aliased control tokens. Raises DataError if aliases change the ids of a probe text."""
        library = load_aliased(self.tokenizer, self.control)
        names = sorted(self.control, key=lambda name: self.control[name])[:PROBED_TOKENS]
        probe = "a b\n".join(["One two", *(f"{name}{name} x" for name in names), "\n\nlast"])
        plain = self.tokenizer.library
        with library_errors(self.tokenizer.origin):
            plain.encode_special_tokens = False
            expected = plain.encode(probe, add_special_tokens=False).ids
            plain.encode_special_tokens = True
            found = library.encode("".join(piece.text for piece in self._pieces(probe)), add_special_tokens=False).ids
        if expected != found:
            raise DataError(f"{self.tokenizer.origin}: special tokens cannot be distinguished from text that spells them")
        return library

    @staticmethod
    def open(tokenizer: Tokenizer | Path | str, template: str | None = None, today: datetime | None = None) -> ChatTokenizer:
        """Open the tokenizer of a folder (or a `tokenizer.json`) with the template `data.template`. Raises DataError."""
        folder = Path(".")
        if not isinstance(tokenizer, Tokenizer):
            path = Path(tokenizer).expanduser()
            folder = path if path.is_dir() else path.parent
            tokenizer = load_tokenizer(str(tokenizer))
        elif template is None:
            raise DataError(
                "data.template: needed for a tokenizer without a folder", fix="--data.template plain (or chatml, or a file)"
            )
        if not isinstance(tokenizer, JsonTokenizer):
            raise DataError(
                "data.tokenizer: chat needs a tokenizer with special tokens",
                found=tokenizer.kind,
                fix="--data.tokenizer FOLDER, with a tokenizer.json",
            )
        names = special_token_names(folder)
        names.setdefault("eos_token", token_name(tokenizer, tokenizer.eot_id))
        loaded = load_template(template, folder, names, today)
        chat = ChatTokenizer(tokenizer, loaded)
        missing = [token for token in NEEDED_TOKENS.get(template or "", ()) if token not in chat.control]
        if missing:
            raise DataError(
                f"data.template {template}: the tokenizer lacks {', '.join(missing)}",
                fix=f"--data.template plain (turns end with {names['eos_token']}), or a Jinja file",
            )
        return chat

    def with_tools(self, tools: list[dict[str, Any]] | None) -> ChatTokenizer:
        """Return this tokenizer with the tools of a conversation in its template, and marks around the control tokens that they spell."""
        if not tools:
            return self
        other = copy(self)
        other.template = self.template.with_tools(marked(tools, self._control_pattern)[0])
        return other

    def mark_spelled(self, messages: Sequence[Message]) -> tuple[list[dict[str, Any]], int]:
        """Return the messages with marks around every spelled control token, and the number of those.

        In answers, control tokens that are not special, such as `<think>`, stay tokens. Raises DataError for the code points
        used as marks.
        """
        out, spelled = [], 0
        for message in messages:
            pattern = self._special_pattern if message["role"] == "assistant" else self._control_pattern
            content, count = marked({key: value for key, value in message.items() if key != "role"}, pattern)
            out.append({"role": message["role"], **content})
            spelled += count
        return out, spelled

    def end_of_turn(self, answer: str) -> int:
        """Return the length of a rendered answer including its end-of-turn token; -1 if it has none."""
        text = answer.rstrip()
        # A spelled token is followed by a mark, so it does not match.
        return len(text) if text.endswith(self._endings) else -1

    def end_before(self, answer: str) -> int:
        """Return the length of an answer that ends with two control tokens, without the last one; -1 if it ends with one."""
        last = max((name for name in self._endings if answer.endswith(name)), key=len, default="")
        return self.end_of_turn(answer[: len(answer) - len(last)])

    def leading_control(self, text: str) -> str:
        """Return the control token at the start of `text`, or an empty string."""
        match = self._control_pattern.match(text)
        return match[0] if match else ""

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode rendered texts with marks. Adds no begin-of-text token beyond the template's.

        No token spans the start of an answer, so the text before it has the same ids as a prompt.
        """
        plans = [self._pieces(text) for text in texts]
        pieces = [piece for plan in plans for piece in plan]
        encodings: dict[bool, Iterator[Any]] = {}
        for continues in {piece.continues for piece in pieces}:
            library = self.continuation_library if continues else self.library
            selected = [piece.text for piece in pieces if piece.continues == continues]
            with library_errors(self.tokenizer.origin):
                encodings[continues] = iter(library.encode_batch(selected, add_special_tokens=False))
        out = []
        for plan in plans:
            ids, learned = [np.empty(0, dtype=np.uint32)], [np.empty(0, dtype=bool)]
            for piece in plan:
                encoding = next(encodings[piece.continues])
                ids.append(np.array(encoding.ids, dtype=np.uint32))
                learned.append(np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 0] < piece.learned)
            out.append(Encoded(np.concatenate(ids).astype(self.tokenizer.dtype), np.concatenate(learned)))
        return out

    @cached_property
    def continuation_library(self) -> Any:
        """The library's tokenizer without SentencePiece's leading space, for text within a text. None if `library` adds no space."""
        spec = self.tokenizer.spec
        parts = {name: without_prefix_space(spec.get(name)) for name in ("normalizer", "pre_tokenizer")}
        return (
            None
            if all(spec.get(name) == part for name, part in parts.items())
            else load_aliased(self.tokenizer, self.control, parts)
        )

    def _pieces(self, text: str) -> list[Piece]:
        """Split a rendered text at the starts of answers and replace control tokens by their aliases."""
        pieces: list[Piece] = []
        pending, learned, done = "", 0, 0
        for match in self._scan.finditer(text):
            pending += text[done : match.start()]
            done = match.end()
            if match["control"] is not None:
                pending += alias(self.control[match["control"]])
            elif match["text"] is not None:
                pending += match["text"]
            elif match["begin"] is not None:
                pieces += self._split_piece(pending, learned, bool(pieces))
                pending, learned = "", 0
            elif match["end"] is not None:
                learned = len(pending)
        return pieces + self._split_piece(pending + text[done:], learned, bool(pieces))

    def _split_piece(self, text: str, learned: int, continues: bool) -> list[Piece]:
        """Return a piece, or two if the text up to the first control token needs `continuation_library`."""
        cut = 0
        if continues and self.continuation_library is not None:
            cut = text.find(ALIAS[0]) if ALIAS[0] in text else len(text)
        both = Piece(text[:cut], learned, True), Piece(text[cut:], learned - cut, False)
        return [piece for piece in both if piece.text]


def marked(value: Any, pattern: re.Pattern[str]) -> tuple[Any, int]:
    """Return a value with marks around all matches in its texts, and their number. Raises DataError for the marks themselves."""
    if isinstance(value, str):
        if any(mark in value for mark in RESERVED):
            raise DataError("contains a Unicode noncharacter (U+FDD0 to U+FDD5)", fix="remove it")
        return pattern.subn(f"{BEGIN_TEXT}\\g<0>{END_TEXT}", value)
    if isinstance(value, list):
        parts = [marked(part, pattern) for part in value]
        return [part for part, _ in parts], sum(count for _, count in parts)
    if isinstance(value, dict):
        named = {key: marked(part, pattern) for key, part in value.items()}
        return {key: part for key, (part, _) in named.items()}, sum(count for _, count in named.values())
    return value, 0


def any_of(names: Mapping[str, int]) -> re.Pattern[str]:
    """Return a pattern that matches any of the names, longest first; without names it never matches."""
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)")


def alias(index: int) -> str:
    """Return the alias of a control token."""
    return f"{ALIAS[0]}{index}{ALIAS[1]}"


def token_name(tokenizer: JsonTokenizer, index: int) -> str:
    """Return the text of the token with this id."""
    added = {int(token["id"]): str(token["content"]) for token in tokenizer.spec.get("added_tokens") or []}
    vocab = tokenizer.spec["model"]["vocab"]
    if index in added:
        return added[index]
    return str(vocab[index][0]) if isinstance(vocab, list) else next(name for name, number in vocab.items() if number == index)


def without_prefix_space(part: Any) -> Any:
    """Return the normalizer or pre-tokenizer without its leading space."""
    if not isinstance(part, dict):
        return part
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            return dict(part, **{name: [without_prefix_space(one) for one in part[name] if one.get("type") != "Prepend"]})
    if part.get("type") == "Prepend":
        return None
    if part.get("type") == "Metaspace":
        kept = {key: value for key, value in part.items() if key != "add_prefix_space"}
        return part if part.get("prepend_scheme") == "never" else dict(kept, prepend_scheme="never")
    return dict(part, add_prefix_space=False) if part.get("add_prefix_space") else part


def load_aliased(tokenizer: JsonTokenizer, control: Mapping[str, int], changes: Mapping[str, Any] | None = None) -> Any:
    """Return the library's tokenizer with control tokens renamed to their aliases and the parts in `changes` replaced."""
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
        # A merge that forms a control token would create it from text.
        keep = [pair[0] not in control and pair[1] not in control and pair[0] + pair[1] not in control for pair in pairs]
        model["merges"] = [merge for merge, kept in zip(model["merges"], keep, strict=True) if kept]
    library = load_library(spec, tokenizer.origin)
    if any(library.token_to_id(alias(index)) != index for index in control.values()):
        raise DataError(f"{tokenizer.origin}: ids of added tokens differ from the file")
    return library
