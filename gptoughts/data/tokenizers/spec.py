"""Read and check the content of a tokenizer.json, and load it into the tokenizers library.

The file comes with a model. Its size, nesting, types and ids are checked before they are used, and its patterns are tried in a child
process with limits: a pattern such as `(a+)+$` takes exponential time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gptoughts.data.text.rows import first_line, require
from gptoughts.data.tokenizers.probe import try_patterns
from gptoughts.errors import DataError
from gptoughts.files import parse_json

MAX_TOKENIZER_BYTES = 128 << 20
"""Size of a tokenizer.json; the largest published ones have 35 MB."""
MAX_ID = 1 << 28
"""Ids are below this, as `model.vocab_size` is: the embedding has a row for each."""
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")


def read_spec(raw: bytes, origin: str) -> dict[str, Any]:
    """Return the content of a tokenizer.json. Raises DataError for one that no tokenizer can have."""
    wrong = f"{origin}: not a tokenizer.json of the tokenizers library"
    if len(raw) > MAX_TOKENIZER_BYTES:
        raise DataError(f"{origin}: larger than {MAX_TOKENIZER_BYTES >> 20} MiB")
    try:
        spec: dict[str, Any] = parse_json(raw)
    except ValueError as error:
        raise DataError(f"{wrong} ({first_line(error)})") from None
    problem = _shape_problem(spec) or _vocab_problem(spec["model"]["vocab"]) or _added_problem(spec.get("added_tokens") or [])
    if problem:
        raise DataError(f"{wrong} ({problem})")
    for name, index in (pair for table in names_of(spec) for pair in table.items()):
        if not 0 <= index < MAX_ID:
            raise DataError(f"{origin}: id of token {name[:40]!r} must be from 0 to {MAX_ID - 1}", found=index)
    if b"\\u" in raw:  # lone surrogates: text that cannot be encoded
        try:
            json.dumps(spec, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError(f"{wrong} (half of a surrogate pair)") from None
    return spec


def _shape_problem(spec: Any) -> str:
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        return "no table model"
    if not isinstance(spec["model"].get("vocab"), dict | list):
        return "no model.vocab"
    for name in PARTS:
        if not isinstance(spec.get(name), dict | None):
            return f"{name} must be a table"
        if not isinstance((spec.get(name) or {}).get("type", ""), str):
            return f"{name}.type must be a string"
    for name, kind in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        listed = (spec.get(name) or {}).get(kind, [])
        if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
            return f"{name}.{kind} must be a list of tables"
    merges = spec["model"].get("merges", [])
    if not isinstance(merges, list) or not all(map(_is_merge, merges)):
        return "model.merges must be a list of pairs of tokens"
    return "" if isinstance(spec["model"].get("unk_token"), str | None) else "model.unk_token must be a string"


def _is_merge(merge: Any) -> bool:
    if isinstance(merge, str):
        return merge.count(" ") == 1
    return isinstance(merge, list) and len(merge) == 2 and isinstance(merge[0], str) and isinstance(merge[1], str)


def _vocab_problem(vocab: dict[str, Any] | list[Any]) -> str:
    if isinstance(vocab, dict):
        return "" if all(type(index) is int for index in vocab.values()) else "an id in model.vocab is not an integer"
    sound = all(isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) for one in vocab)
    return "" if sound and all(type(one[1]) in (int, float) for one in vocab) else "model.vocab must list [token, score]"


def _added_problem(added: Any) -> str:
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        return "added_tokens must be a list of tables"
    for token in added:
        if not isinstance(token.get("content"), str) or not token["content"]:
            return "an added token without content"
        if type(token.get("id")) is not int:
            return f"the id of added token {token['content'][:40]!r} is not an integer"
    return ""


def names_of(spec: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Return name -> id of the model's vocabulary, and of the added tokens."""
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, list):  # A Unigram model lists [token, score] pairs.
        vocab = {entry[0]: index for index, entry in enumerate(vocab)}
    return vocab, {token["content"]: token["id"] for token in spec.get("added_tokens") or []}


def read_characters(raw: bytes, origin: str) -> str:
    """Return the characters of a saved character tokenizer. Raises DataError."""
    try:
        content = parse_json(raw)
        characters = content["characters"] if isinstance(content, dict) else None
        if isinstance(characters, str):
            characters.encode()
            return characters
    except (ValueError, KeyError):
        pass
    raise DataError(f"{origin}: not a saved character tokenizer")


def load_library(spec: Mapping[str, Any], origin: str) -> Any:
    """Return the tokenizers library's object for a tokenizer.json. Raises DataError, also for patterns that take too long."""
    require("tokenizers", "train", origin)
    import tokenizers

    try_patterns(spec, origin)
    with library_errors(origin):
        try:
            library = tokenizers.Tokenizer.from_str(json.dumps(spec))
            library.encode("a")  # a post-processor can name tokens that do not exist
            return library
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{origin}: the tokenizers library cannot load it ({first_line(error)})") from None


@contextmanager
def library_errors(origin: str) -> Iterator[None]:
    """Turn errors of the tokenizers library, bare Exceptions, and its panics, which derive from BaseException, into a DataError."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{origin}: the tokenizers library fails on this text ({first_line(error)})") from None
