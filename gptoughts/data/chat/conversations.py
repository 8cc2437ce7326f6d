"""Rows of chat data, checked: each becomes a list of messages, or a problem that names file, line and what is wrong.

A row has `messages` (a list of `role` and `content`), or one question and its answer under one of these pairs of names:
`prompt` + `response` (or `completion`), `instruction` (+ `input` or `context`) + `output` (or `response`), `question` + `answer`;
with them `system`, where it is given. What else stands in a row, such as an id, is not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoughts.data.chat.template import REASONING, Template
from gptoughts.data.text.sources import ROW_SUFFIXES, first_line, json_row, open_lines, open_source, require
from gptoughts.errors import DataError, nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
PAIRS = (
    ("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("instruction", "response"), ("question", "answer"),
)  # fmt: skip
BESIDE = {"instruction": ("input", "context")}
"""What stands beside a question and belongs to it; it follows after an empty line, as in Alpaca."""
UNREADABLE = ("tool_calls", "function_call", "tool_call_id", "weight", "images", "audio")
"""Keys of a message that would change what it says, and that are not supported."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character of UTF-16, which JSON can spell; UTF-8, and so a tokenizer, has none."""
NAMES_OF_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """Messages, and the `file:line` (or row) that they came from."""

    where: str
    messages: list[dict[str, Any]]


class Problem(DataError):
    """One row that cannot be learned from."""


def chat_files(spec: str) -> list[Path]:
    """The files behind `data.path`. Raises DataError where one of them has no rows."""
    files = list(open_source(spec).files)
    other = [path for path in files if not path.name.endswith(ROW_SUFFIXES)]
    if other or not files:
        kinds = ", ".join(ROW_SUFFIXES)
        raise DataError(f"{other[0] if other else spec}: chat data are rows; give files that end in {kinds}")
    return files


def conversations(files: list[Path], template: Template) -> Iterator[Conversation | Problem]:
    """Every row of the files in order, as a conversation or as what is wrong with it."""
    for path in files:
        for where, row in read_rows(path):
            if isinstance(row, Problem):
                yield row
                continue
            try:
                yield Conversation(where, checked(messages_of(row), template))
            except DataError as error:
                yield Problem(f"{where}: {error}")


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | Problem]]:
    """The rows of a file with their places; blank lines are passed over. Raises DataError where the file itself cannot be read."""
    if path.name.endswith(".parquet"):
        yield from parquet_rows(path)
        return
    number = 0
    try:
        with open_lines(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, json_object(line, where)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read after line {number} ({first_line(error)})") from None


def json_object(line: bytes, where: str) -> dict[str, Any] | Problem:
    """One line as a JSON object, or what is wrong with it."""
    try:
        return json_row(line, where)
    except DataError as error:
        return Problem(str(error))


def parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a Parquet file."""
    require("pyarrow", "hf", path.name)
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for content in batch.to_pylist():
                    row += 1
                    yield f"{path}:{row}", content
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet after row {row} ({first_line(error)})") from None


def messages_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row's messages, as they are written. Raises DataError where it has none, or several kinds of them."""
    present = {key for key, value in row.items() if value is not None}
    if row.get("tools"):
        raise DataError("has tools, which are not supported; remove the row, or write the tools into its system message")
    pairs = [pair for pair in PAIRS if present.issuperset(pair)]
    if "messages" in present:
        if pairs:
            raise DataError(f"has messages and {' + '.join(pairs[0])}; which is meant? Remove one of them")
        return checked_list(row["messages"])
    if len(pairs) > 1:
        raise DataError(f"has {' and '.join(' + '.join(pair) for pair in pairs)}; which is meant? Keep one pair")
    if not pairs:
        here = ", ".join(sorted(map(str, row))) or "nothing"
        raise DataError(f"no messages and no {', '.join(' + '.join(pair) for pair in PAIRS)}; keys here: {here}")
    question, answer = pairs[0]
    beside = [key for key in ("input", "context") if row.get(key)]
    if beside and (question not in BESIDE or len(beside) > 1):
        raise DataError(f"has {', '.join(beside)} beside {question}, which would be left out; write messages instead")
    asked = [row[question], *(row[key] for key in beside)]
    if not all(isinstance(part, str) for part in asked):
        raise DataError(f"{question} must be text, found {type(asked[0]).__name__}; for several turns write messages")
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": "\n\n".join(asked)}, {"role": "assistant", "content": row[answer]}]


def checked_list(value: Any) -> list[dict[str, Any]]:
    """`messages` as a list of objects."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise DataError("messages must be a list of objects with role and content")
    return value


def checked(messages: list[dict[str, Any]], template: Template) -> list[dict[str, Any]]:
    """The messages, once each can be written and every question has its answer. Raises DataError that says which cannot."""
    if not messages:
        raise DataError("messages is empty")
    for number, message in enumerate(messages, 1):
        check_message(message, f"message {number}", template)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise DataError("no answer: no message has the role assistant")
    if roles[-1] != "assistant":
        raise DataError(f"no answer after the last message, whose role is {roles[-1]}; remove it, or add the answer")
    if "user" not in roles[: roles.index("assistant")]:
        raise DataError(
            f"message {roles.index('assistant') + 1} answers before anything was asked; a user's message must come first"
        )
    return messages


def check_message(message: Mapping[str, Any], name: str, template: Template) -> None:
    """Raises DataError for a message that is not a known role with text."""
    role, content = message.get("role"), message.get("content")
    if "role" not in message and "from" in message:
        raise DataError(f"{name} has from and value; rename them to role and content (human is user, gpt is assistant)")
    if not isinstance(role, str):
        raise DataError(f"{name}: role must be text, found {type(role).__name__}; roles are {', '.join(ROLES)}")
    if role not in ROLES:
        hint = f" (did you mean {NAMES_OF_ROLES[role]!r}?)" if role in NAMES_OF_ROLES else nearest(str(role), ROLES)
        raise DataError(f"{name}: unknown role {role!r}{hint}; roles are {', '.join(ROLES)}")
    unreadable = [key for key in UNREADABLE if message.get(key) is not None]
    if unreadable:
        raise DataError(f"{name} has {unreadable[0]}, which is not supported; remove the row, or write it into content")
    if isinstance(content, list):
        raise DataError(f"{name}: content is a list of parts; only text is supported: join the parts into one text")
    if not isinstance(content, str):
        raise DataError(f"{name}: content must be text, found {type(content).__name__}")
    broken = [key for key, value in message.items() if isinstance(value, str) and SURROGATE.search(value)]
    if broken:
        raise DataError(f"{name}: {broken[0]} holds half a surrogate pair, which is no character; remove it")
    if role in ("user", "assistant") and not content.strip():
        raise DataError(f"{name}: empty answer" if role == "assistant" else f"{name}: empty question")
    thought = [key for key in REASONING if message.get(key)]
    if thought and not any(key in template.source for key in REASONING):
        raise DataError(f"{name} has {thought[0]}, which {template.origin} does not write; remove it, or write it into content")
