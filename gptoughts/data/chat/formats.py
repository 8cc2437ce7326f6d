"""Convert rows of the common chat data formats to messages: the only place that knows their keys.

| format | keys of a row |
|---|---|
| OpenAI | `messages`: `role`, `content` (text, or a list of text parts, or null beside `tool_calls`) |
| ShareGPT | `conversations`: `from`, `value` |
| TRL | `prompt` and `completion`, each a text or a list of messages; only the completion is learned |
| Alpaca | `instruction` (+ `input` or `context`) and `output` or `response` |
| pairs | `prompt` and `response`, `question` and `answer` |

each with an optional `system`, `tools` and, for Alpaca and pairs, `history`: a list of [question, answer]. Lists may be JSON text, as in
CSV. An answer with `weight`, `train`, `trainable` or `loss_mask` of 0 or false is not learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gptoughts.errors import DataError, nearest
from gptoughts.files import parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
ROLE_ALIASES = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant", "chatgpt": "assistant",
}  # fmt: skip
SHAREGPT_ROLES = {**ROLE_ALIASES, "user": "user", "assistant": "assistant", "system": "system", "tool": "tool"}
LISTS = ("messages", "conversations", "conversation")
"""Keys of a list of turns, in either form."""
PAIRS = (
    ("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("instruction", "response"), ("question", "answer"),
)  # fmt: skip
INPUT_KEYS = ("input", "context")
"""Keys appended to an instruction after an empty line, as in Alpaca."""
LEARN_KEYS = ("weight", "train", "trainable", "loss_mask")
"""Keys of an answer that say whether it is learned."""
KNOWN_KEYS = {"role", "content", *LEARN_KEYS}
UNSUPPORTED_KEYS = ("function_call", "images", "image", "audio", "video", "videos")
"""Keys of a message that change its meaning and are not supported."""


@dataclass(frozen=True)
class Turns:
    """Messages of a row, the indices of answers that are not learned, its tools, and the keys of the row that were read."""

    messages: list[dict[str, Any]]
    unlearned: frozenset[int] = frozenset()
    tools: list[dict[str, Any]] | None = None
    read: frozenset[str] = frozenset()


def turns_of(row: Mapping[str, Any]) -> Turns:
    """Return a row's messages, not yet validated. Raises DataError if it has none, or several kinds."""
    present = {key for key, value in row.items() if value is not None}
    if row.get("functions"):
        raise DataError("functions: not supported", fix='"tools": [{"type": "function", "function": ...}]')
    kinds: list[tuple[str, ...]] = [(key,) for key in LISTS if key in present]
    kinds += [pair for pair in PAIRS if present.issuperset(pair)]
    if len(kinds) > 1:
        raise DataError("ambiguous keys", found=" and ".join(" + ".join(kind) for kind in kinds), fix="keep one of them")
    if not kinds:
        known = [*LISTS[:2], *(" + ".join(pair) for pair in PAIRS)]
        raise DataError(f"no {', no '.join(known)}", found=f"keys {', '.join(sorted(map(str, row))) or 'none'}")
    if "system" in present and not isinstance(row["system"], str):
        raise DataError("system: must be a string", found=type(row["system"]).__name__)
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    tools = list_of(row["tools"], "tools", "with type and function") if row.get("tools") else None
    found = _turns(row, kinds[0], system)
    return replace(found, tools=tools or None, read=found.read | {*kinds[0], "system", "tools"})


def _turns(row: Mapping[str, Any], keys: Sequence[str], system: list[dict[str, Any]]) -> Turns:
    """Return the messages under `keys`: a list of turns, or a question and its answer."""
    first, *rest = keys
    if not rest:
        return learning([*system, *map(message_of, list_of(row[first], first))])
    answer = rest[0]
    if isinstance(row[first], list) or isinstance(row[answer], list):
        return _prompt_and_completion(system, row[first], row[answer], (first, answer))
    past = row.get("history") or []
    past = from_text(past)
    if not isinstance(past, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in past):
        raise DataError("history: must be a list of [question, answer]")
    turns = [{"role": role, "content": text} for pair in past for role, text in zip(("user", "assistant"), pair, strict=True)]
    question, inputs = _question(row, first)
    turns += [{"role": "user", "content": question}, {"role": "assistant", "content": row[answer]}]
    return Turns([*system, *turns], read=frozenset({*inputs, "history"}))


def _prompt_and_completion(system: list[dict[str, Any]], prompt: Any, completion: Any, keys: tuple[str, str]) -> Turns:
    """Return both lists as one; answers of the prompt are not learned."""
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list_of(prompt, keys[0])
    completion = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list_of(completion, keys[1])
    before = [*system, *map(message_of, prompt)]
    found = learning([*before, *map(message_of, completion)])
    given = {index for index, message in enumerate(before) if message.get("role") == "assistant"}
    return Turns(found.messages, found.unlearned | given)


def _question(row: Mapping[str, Any], key: str) -> tuple[str, list[str]]:
    """Return the question with Alpaca's input below it, and the keys of the input."""
    inputs = [name for name in INPUT_KEYS if row.get(name)]
    if inputs and (key != "instruction" or len(inputs) > 1):
        raise DataError(f"{', '.join(inputs)}: not supported with {key}", fix="write messages instead")
    parts = [row[key], *(row[name] for name in inputs)]
    for part in parts:
        if not isinstance(part, str):
            raise DataError(f"{key}: must be a string or a list of messages", found=type(part).__name__)
    return "\n\n".join(parts), inputs


def list_of(value: Any, key: str, objects: str = "with role and content") -> list[dict[str, Any]]:
    """Return the value of a key if it is a list of objects, or the JSON text of one. Raises DataError."""
    value = from_text(value)
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise DataError(f"{key}: must be a list of objects {objects}")
    return value


def from_text(value: Any) -> Any:
    """Return the list or object of a JSON text, any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return parse_json(value)
        except ValueError:
            return value
    return value


def message_of(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with `role` and `content`: names of ShareGPT are translated, text parts joined. Raises DataError."""
    made = dict(message)
    if made.get("role") is None and "from" in made:
        name = made.pop("from")
        made.pop("role", None)
        if not isinstance(name, str) or name not in SHAREGPT_ROLES:
            raise DataError(
                f"from: must be one of {', '.join(SHAREGPT_ROLES)}{nearest(str(name), SHAREGPT_ROLES)}", found=repr(name)
            )
        made["role"] = SHAREGPT_ROLES[name]
        if made.get("content") is None and "value" in made:
            made["content"] = made.pop("value")
    if isinstance(made.get("content"), list):
        made["content"] = _joined(made["content"])
    return made


def _joined(parts: Sequence[Any]) -> str:
    """Return the text of a list of parts. Raises DataError for parts that are not text."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise DataError("content: has a part that is not text", found=f"type {kind!r}", fix="remove the row")
    return "".join(texts)


def learning(messages: Sequence[Mapping[str, Any]]) -> Turns:
    """Take the keys that say what is learned out of the messages. Raises DataError for weights between 0 and 1."""
    kept, unlearned = [], set()
    for index, message in enumerate(messages):
        given = {key: message[key] for key in LEARN_KEYS if message.get(key) is not None}
        wrong = next((key for key, value in given.items() if value not in (0, 1)), None)
        if wrong is not None:
            raise DataError(f"message {index + 1}: {wrong} must be 0, 1, true or false", found=repr(given[wrong]))
        if len({bool(value) for value in given.values()}) > 1:
            raise DataError(f"message {index + 1}: {' and '.join(given)} contradict each other")
        if message.get("role") == "assistant":
            if given and not all(given.values()):
                unlearned.add(index)
        elif given and any(given.values()):
            # Only answers are learned; a weight of 0 on another message says what is so anyway.
            raise DataError(f"message {index + 1}: {next(iter(given))} of a message that is not an answer")
        kept.append({key: value for key, value in message.items() if key not in LEARN_KEYS})
    return Turns(kept, frozenset(unlearned))
