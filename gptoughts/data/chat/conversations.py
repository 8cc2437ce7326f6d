"""Read and validate chat data: each row becomes a list of messages, or an error with file and line.

A row has `messages` (a list of `role` and `content`), or one question and answer under one of these key pairs:
`prompt` + `response` (or `completion`), `instruction` (+ `input` or `context`) + `output` (or `response`), `question` + `answer`;
with an optional `system`. Other keys, such as an id, are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoughts.data.chat.template import REASONING, Template
from gptoughts.data.text.rows import numbered
from gptoughts.data.text.sources import ROW_SUFFIXES, first_line, json_row, open_lines, open_source, require
from gptoughts.errors import DataError, nearest

MAX_ROW_BYTES = 16 << 20
"""Bytes of a conversation, about four million tokens: its rendering takes several times as much."""
ROLES = ("system", "developer", "user", "assistant", "tool")
PAIRS = (
    ("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("instruction", "response"), ("question", "answer"),
)  # fmt: skip
INPUT_KEYS = ("input", "context")
"""Keys appended to an instruction after an empty line, as in Alpaca."""
UNSUPPORTED_KEYS = ("tool_calls", "function_call", "tool_call_id", "weight", "images", "audio")
"""Keys of a message that change its meaning and are not supported."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""An unpaired UTF-16 surrogate: valid in JSON escapes, not encodable as UTF-8."""
ROLE_ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """Validated messages and their source, `file:line` (or row)."""

    where: str
    messages: list[dict[str, Any]]


class InvalidRow(DataError):
    """A row that cannot be trained on. The text is one line."""


def one_line(error: DataError) -> str:
    """Return the text of an error as one line, for lists of problems."""
    return str(error).replace("\n  ", " ")


def chat_files(spec: str) -> list[Path]:
    """Return the files of `data.path`. Raises DataError for a file type without rows."""
    files = list(open_source(spec).files)
    other = [path for path in files if not path.name.endswith(ROW_SUFFIXES)]
    if other or not files:
        raise DataError(
            f"{other[0] if other else spec}: not a chat data file", fix=f"files that end in {', '.join(ROW_SUFFIXES)}"
        )
    return files


def conversations(files: list[Path], template: Template) -> Iterator[Conversation | InvalidRow]:
    """Yield every row of the files in order, as a conversation or an error."""
    for path in files:
        for where, row in read_rows(path):
            if isinstance(row, InvalidRow):
                yield row
                continue
            try:
                yield Conversation(where, check_messages(messages_of(row), template))
            except DataError as error:
                yield InvalidRow(f"{where}: {one_line(error)}")


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | InvalidRow]]:
    """Yield (`file:line`, row) and skip blank lines. Raises DataError for an unreadable file."""
    if path.name.endswith(".parquet"):
        yield from parquet_rows(path)
        return
    number = 0
    try:
        with open_lines(path) as lines:
            for number, line in numbered(lines, str(path), MAX_ROW_BYTES):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, json_object(line, where)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read after line {number} ({first_line(error)})") from None


def json_object(line: bytes, where: str) -> dict[str, Any] | InvalidRow:
    """Return one line as a JSON object, or an error."""
    try:
        return json_row(line, where)
    except DataError as error:
        return InvalidRow(one_line(error))


def parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`file:row`, row) of a Parquet file. Raises DataError."""
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
        raise DataError(f"{path}: cannot be read as Parquet after row {row} ({first_line(error)})") from None


def messages_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row's messages, not yet validated. Raises DataError if it has none, or several kinds."""
    present = {key for key, value in row.items() if value is not None}
    if row.get("tools"):
        raise DataError("tools: not supported", fix="remove the row, or put the tools into its system message")
    pairs = [pair for pair in PAIRS if present.issuperset(pair)]
    if "messages" in present:
        if pairs:
            raise DataError("ambiguous keys", found=f"messages and {' + '.join(pairs[0])}", fix="keep one of them")
        return check_list(row["messages"])
    if len(pairs) > 1:
        raise DataError("ambiguous keys", found=" and ".join(" + ".join(pair) for pair in pairs), fix="keep one pair")
    if not pairs:
        raise DataError(
            f"no messages and no {', '.join(' + '.join(pair) for pair in PAIRS)}",
            found=f"keys {', '.join(sorted(map(str, row))) or 'none'}",
        )
    question, answer = pairs[0]
    inputs = [key for key in INPUT_KEYS if row.get(key)]
    if inputs and (question != "instruction" or len(inputs) > 1):
        raise DataError(f"{', '.join(inputs)}: not supported with {question}", fix="write messages instead")
    parts = [row[question], *(row[key] for key in inputs)]
    if not all(isinstance(part, str) for part in parts):
        raise DataError(f"{question}: must be a string", found=type(parts[0]).__name__, fix="write messages for several turns")
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": "\n\n".join(parts)}, {"role": "assistant", "content": row[answer]}]


def check_list(value: Any) -> list[dict[str, Any]]:
    """Return `messages` if it is a list of objects. Raises DataError."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise DataError("messages: must be a list of objects with role and content")
    return value


def check_messages(messages: list[dict[str, Any]], template: Template) -> list[dict[str, Any]]:
    """Return the messages if each is valid, a question comes first and an answer last. Raises DataError."""
    if not messages:
        raise DataError("messages: empty")
    for number, message in enumerate(messages, 1):
        check_message(message, f"message {number}", template)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise DataError("messages: no answer (role assistant)")
    if roles[-1] != "assistant":
        raise DataError(
            "messages: the last message must be an answer", found=f"role {roles[-1]}", fix="remove it, or add the answer"
        )
    if "user" not in roles[: roles.index("assistant")]:
        raise DataError(f"message {roles.index('assistant') + 1}: an answer must follow a message of role user")
    return messages


def check_message(message: Mapping[str, Any], name: str, template: Template) -> None:
    """Raise DataError unless the message has a known role and text content."""
    role, content = message.get("role"), message.get("content")
    if "role" not in message and "from" in message:
        raise DataError(f"{name}: has from and value", fix="rename them to role and content (human: user, gpt: assistant)")
    if not isinstance(role, str):
        raise DataError(f"{name}: role must be one of {', '.join(ROLES)}", found=type(role).__name__)
    if role not in ROLES:
        hint = f" (did you mean {ROLE_ALIASES[role]!r}?)" if role in ROLE_ALIASES else nearest(role, ROLES)
        raise DataError(f"{name}: role must be one of {', '.join(ROLES)}{hint}", found=repr(role))
    unsupported = [key for key in UNSUPPORTED_KEYS if message.get(key) is not None]
    if unsupported:
        raise DataError(f"{name}: {unsupported[0]} is not supported", fix="remove the row, or put it into content")
    if isinstance(content, list):
        raise DataError(f"{name}: content must be a string", found="a list of parts", fix="join the text parts")
    if not isinstance(content, str):
        raise DataError(f"{name}: content must be a string", found=type(content).__name__)
    broken = [key for key, value in message.items() if isinstance(value, str) and SURROGATE.search(value)]
    if broken:
        raise DataError(f"{name}: {broken[0]} has an unpaired surrogate", fix="remove it")
    if role in ("user", "assistant") and not content.strip():
        raise DataError(f"{name}: empty answer" if role == "assistant" else f"{name}: empty question")
    reasoning = [key for key in REASONING if message.get(key)]
    if reasoning and not any(key in template.source for key in REASONING):
        raise DataError(f"{name}: {reasoning[0]} is not rendered by {template.origin}", fix="remove it, or put it into content")
