"""Read and validate chat data: each row becomes a list of messages, or an error with file and line. Formats: `formats.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoughts.console import escaped
from gptoughts.data.chat.formats import KNOWN_KEYS, ROLE_ALIASES, ROLES, UNSUPPORTED_KEYS, turns_of
from gptoughts.data.chat.template import REASONING, Template
from gptoughts.data.text.objects import COMPRESSED, KINDS, ROWS, TABLES, ending_of, objects
from gptoughts.data.text.sources import Source, open_source
from gptoughts.errors import DataError, nearest

MAX_ROW_BYTES = 16 << 20
"""Bytes of a conversation, about four million tokens: its rendering takes several times as much."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""An unpaired UTF-16 surrogate: valid in JSON escapes, not encodable as UTF-8."""
TOOL_KEYS = ("tool_calls", "tool_call_id")
"""Keys of messages with calls of tools, for templates that read them."""
SUFFIXES = (*ROWS, *TABLES)


@dataclass(frozen=True)
class Conversation:
    """Validated messages and their source, `file:line` (or row)."""

    where: str
    messages: list[dict[str, Any]]
    unlearned: frozenset[int] = frozenset()
    """Indices of answers that are not learned."""
    unused: frozenset[str] = frozenset()
    """Keys of the row and its messages that neither the format nor the template reads."""
    tools: list[dict[str, Any]] | None = None


class InvalidRow(DataError):
    """A row that cannot be trained on. The text is one line."""


def one_line(error: DataError) -> str:
    """Return the text of an error as one line, for lists of problems."""
    return escaped(str(error).replace("\n  ", " ").replace("\n", "\\n"))


def chat_source(spec: str) -> Source:
    """Return the source `data.path`. Raises DataError for a file type without rows."""
    source = open_source(spec)
    other = [path for path in source.files if ending_of(path) not in SUFFIXES]
    if other or not source.files:
        fix = f"files that end in {', '.join(SUFFIXES)} (also {' and '.join(COMPRESSED)})"
        raise DataError(f"{other[0] if other else spec}: not a chat data file", fix=fix)
    return source


def conversations(files: list[Path], template: Template) -> Iterator[Conversation | InvalidRow]:
    """Yield every row of the files in order, as a conversation or an error."""
    for path in files:
        for where, row in read_rows(path):
            if isinstance(row, InvalidRow):
                yield row
                continue
            try:
                yield conversation_of(row, where, template)
            except DataError as error:
                yield InvalidRow(f"{where}: {one_line(error)}")


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | InvalidRow]]:
    """Yield (`file:line`, row) and skip blank lines. Raises DataError for an unreadable file."""
    is_csv = KINDS[ending_of(path) or ""] == "csv"
    for where, row in objects(path, MAX_ROW_BYTES):
        if isinstance(row, DataError):
            yield where, InvalidRow(one_line(row))
        else:  # An empty field of a table is an absent one.
            yield where, {key: value for key, value in row.items() if value != ""} if is_csv else row


def conversation_of(row: Mapping[str, Any], where: str, template: Template) -> Conversation:
    """Return a row's conversation. Raises DataError for a row that cannot be trained on."""
    turns = turns_of(row)
    messages = check_messages(turns.messages, template)
    answers = {index for index, message in enumerate(messages) if message["role"] == "assistant"}
    if answers <= turns.unlearned:
        raise DataError("messages: no answer is learned", fix="remove the row, or give an answer weight 1")
    if turns.tools and not template.reads_tools:
        fix = "remove them, put them into the system message, or --data.template FILE"
        raise DataError(f"tools: not rendered by {template.origin}", fix=fix)
    of_messages = {key for message in messages for key, value in message.items() if value is not None and key not in KNOWN_KEYS}
    unread = {key for key in of_messages if not template.names(key) and key not in REASONING}
    of_row = {str(key) for key, value in row.items() if value is not None} - turns.read
    return Conversation(where, messages, turns.unlearned, frozenset(unread | of_row), turns.tools)


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
    if not isinstance(role, str):
        raise DataError(f"{name}: role must be one of {', '.join(ROLES)}", found=type(role).__name__)
    if role not in ROLES:
        hint = f" (did you mean {ROLE_ALIASES[role]!r}?)" if role in ROLE_ALIASES else nearest(role, ROLES)
        raise DataError(f"{name}: role must be one of {', '.join(ROLES)}{hint}", found=repr(role))
    unsupported = [key for key in UNSUPPORTED_KEYS if message.get(key) is not None]
    if unsupported:
        raise DataError(f"{name}: {unsupported[0]} is not supported", fix="remove the row, or put it into content")
    unread = [key for key in TOOL_KEYS if message.get(key) and "tool_calls" not in template.source]
    if unread:
        raise DataError(
            f"{name}: {unread[0]} is not rendered by {template.origin}", fix="remove the row, or --data.template FILE"
        )
    calls = role == "assistant" and bool(message.get("tool_calls"))
    if content is None and calls:
        return
    if not isinstance(content, str):
        raise DataError(f"{name}: content must be a string", found=type(content).__name__)
    broken = [key for key, value in message.items() if isinstance(value, str) and SURROGATE.search(value)]
    if broken:
        raise DataError(f"{name}: {broken[0]} has an unpaired surrogate", fix="remove it")
    if role in ("user", "assistant") and not content.strip() and not calls:
        raise DataError(f"{name}: empty answer" if role == "assistant" else f"{name}: empty question")
    reasoning = [key for key in REASONING if message.get(key)]
    if reasoning and not any(key in template.source for key in REASONING):
        raise DataError(f"{name}: {reasoning[0]} is not rendered by {template.origin}", fix="remove it, or put it into content")
