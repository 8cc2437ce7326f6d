"""Try the patterns of a tokenizer.json on ordinary text in a child process with limits on CPU time, memory and output.

The tokenizers library cannot be interrupted, and its patterns backtrack: `(\\w+\\s?)+$` takes exponential time on a sentence. Patterns
of quadratic time pass, so text of several megabytes without a space can still be slow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gptoughts.errors import DataError
from gptoughts.processes import LimitedChild, LimitExceeded

MAX_SECONDS = 10
"""CPU time of all probe texts; the patterns of published tokenizers take milliseconds."""
MAX_MEMORY = 2 << 30
MAX_GROWTH = 64
"""Bytes that normalizers and pre-tokenizers may make of one byte."""
LIMITS = f"{MAX_SECONDS} s of CPU time, {MAX_MEMORY >> 30} GiB of memory, {MAX_GROWTH} times the text"
RUN = 4096
"""Length of a run of one character in the probe; patterns of cubic time exceed the limits on it."""
MOST_LITERALS = 48
WITHOUT_PATTERNS = {
    None, "ByteLevel", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Nmt", "Strip", "StripAccents", "BertNormalizer", "BertPreTokenizer",
    "Whitespace", "WhitespaceSplit", "Metaspace", "Digits", "Punctuation", "UnicodeScripts",
}  # fmt: skip
"""Normalizers and pre-tokenizers that neither search a pattern of the file nor insert text of the file."""
PASSAGE = (
    "The quick brown fox jumps over the lazy dog's back, and it's 2026-01-31 at 10:45. Prices: $1,234.50; see https://example.com/a?b=c#d.\n"
    "def main(arguments):\n    return [one + 1 for one in arguments]  # naïve café 世界 🎉 Привет мир\n\n\t{\"key\": null, 'x': 3.14e-10}\n"
)


def patterns_in(value: Any) -> list[str]:
    """Return the regular expressions of a part of a tokenizer.json, sorted."""
    found, level = set(), [value]
    while level:
        one = level.pop()
        if isinstance(one, dict):
            if isinstance(one.get("Regex"), str):
                found.add(one["Regex"])
            level += one.values()
        elif isinstance(one, list):
            level += one
    return sorted(found)


def types_in(part: Any) -> set[Any]:
    """Return the types of a normalizer or pre-tokenizer, and of those in a sequence."""
    if not isinstance(part, dict):
        return {None}
    parts = part.get("normalizers", part.get("pretokenizers"))
    if isinstance(parts, list) and parts:
        return set().union(*map(types_in, parts))
    return {part["type"] if isinstance(part.get("type"), str) else "unknown"}


def try_patterns(spec: Mapping[str, Any], origin: str) -> None:
    """Run normalizer, pre-tokenizer and the decoder's patterns in the child. Raises DataError where a limit is exceeded."""
    parts = {name: spec.get(name) for name in ("normalizer", "pre_tokenizer")}
    patterns = patterns_in(spec.get("decoder"))
    if not patterns and set().union(*map(types_in, parts.values())) <= WITHOUT_PATTERNS:
        return
    request = {**parts, "patterns": patterns, "literals": "".join(patterns_in(list(parts.values())) + patterns)}
    if json.dumps(request) in _passed:
        return
    try:
        answer = CHILD.ask(request)
    except LimitExceeded as error:
        raise DataError(f"{origin}: its patterns fail on ordinary text: {error}", found=f"more than {LIMITS}") from None
    if "error" in answer:
        raise DataError(f"{origin}: its patterns fail on ordinary text ({answer['error']})")
    _passed.add(json.dumps(request))


_passed: set[str] = set()
"""Requests that stayed within the limits, in this process."""


CHILD = LimitedChild(__name__, "answering", MAX_SECONDS, MAX_MEMORY)


# --- in the child


def answering() -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return the function that tries one request."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return _tried


def _tried(request: Mapping[str, Any]) -> dict[str, Any]:
    from tokenizers import Tokenizer

    parts = [(request["normalizer"], request["pre_tokenizer"])]
    parts += [
        (None, {"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False})
        for one in request["patterns"]
    ]
    try:
        for normalizer, pre_tokenizer in parts:
            library = Tokenizer.from_str(json.dumps(_without_model(normalizer, pre_tokenizer)))
            for text in probe_texts(request["literals"]):
                changed = text if library.normalizer is None else library.normalizer.normalize_str(text)
                size = len(changed)
                if size <= MAX_GROWTH * len(text) and library.pre_tokenizer is not None:
                    size = sum(len(piece) for piece, _ in library.pre_tokenizer.pre_tokenize_str(changed))
                if size > MAX_GROWTH * len(text):
                    return {"limit": "writes too much"}
    except MemoryError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = str(error).strip().splitlines()
        return {"error": lines[0][:200] if lines else type(error).__name__}
    return {}


def _without_model(normalizer: Any, pre_tokenizer: Any) -> dict[str, Any]:
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "vocab": {}, "merges": []}
    return {"version": "1.0", "added_tokens": [], "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "model": model}


def probe_texts(literals: str) -> Iterator[str]:
    """Yield a passage, and runs of the characters that are common or in the patterns, each with an end that breaks it."""
    yield PASSAGE
    yield PASSAGE.replace("\n", " ") * 8
    letters = dict.fromkeys("aA 1\n-.中" + "".join(dict.fromkeys(literals))[:MOST_LITERALS])
    for letter in letters:
        yield f"{letter * RUN}!"
        yield f"{letter * RUN} b"
    words = "".join(one for one in literals if one.isalnum())[:MOST_LITERALS]
    yield f"{'ab' * RUN}!"
    yield f"{(words or 'a ') * (RUN // max(1, len(words)))}!"
