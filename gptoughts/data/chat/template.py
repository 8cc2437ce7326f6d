"""Chat templates: Jinja, rendered as by `apply_chat_template` of transformers.

Templates come with models and are untrusted: they run in Jinja's sandbox, in a child process, and receive only plain values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from copy import copy
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from gptoughts.data.chat.sandbox import BEGIN_ANSWER, END_ANSWER, SANDBOX, Rejected
from gptoughts.data.text.sources import first_line, require
from gptoughts.errors import DataError, nearest
from gptoughts.files import load_json, owned, parse_json, read_limited

Message = Mapping[str, Any]

BEGIN_TEXT, END_TEXT = "\ufdd0", "\ufdd1"
"""Marks in rendered text: around a special token that a message only spells, and around text to train on.

Unicode noncharacters: reserved for internal use, absent from tokenizers and templates.
"""
ALIAS = ("\ufdd4", "\ufdd5")
RESERVED = (BEGIN_TEXT, END_TEXT, BEGIN_ANSWER, END_ANSWER, *ALIAS)

BUILT_IN = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "plain": (
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token + '\n' }}"
        "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] + '\n\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    ),
}
"""chatml needs the tokens <|im_start|> and <|im_end|>; plain needs only end-of-text."""
NEEDED_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message's reasoning in data sets. A template reads one of them and is given all."""


class Template:
    """A template, compiled and rendered in a child process with limits.

    origin   its source, for messages
    tokens   its variables such as `eos_token`
    today    the date returned by `strftime_now`; None is the clock, as in transformers

    Raises DataError if the template does not compile.
    """

    def __init__(self, source: str, origin: str, tokens: Mapping[str, str], today: datetime | None = None) -> None:
        self.source, self.origin, self.tokens, self.today = source, origin, dict(tokens), today
        require("jinja2", "train", origin)
        try:
            reads = SANDBOX.compile(source, origin)
        except Rejected as error:
            line = "" if error.line is None else f", line {error.line}"
            raise DataError(f"{origin}{line}: not a Jinja template ({error})") from None
        self.has_generation_prompt = "add_generation_prompt" in reads["variables"]
        self.reads_tools = "tools" in reads["variables"]
        self.reads_clock = "strftime_now" in source
        self.marks_answers: bool = reads["marks_answers"]
        self.literals: str = reads["literals"]
        self.tools: list[dict[str, Any]] | None = None

    def names(self, key: str) -> bool:
        """Whether the source has `key` as a word, so that it may read it."""
        return re.search(rf"\b{re.escape(key)}\b", self.source) is not None

    def with_tools(self, tools: list[dict[str, Any]] | None) -> Template:
        """Return this template with the tools of a conversation."""
        other = copy(self)
        other.tools = tools
        return other

    @cached_property
    def takes_objects(self) -> bool | None:
        """Whether it renders arguments of calls as objects, as transformers documents; False if only as JSON text, None if neither."""
        for arguments in ({"a": "b"}, '{"a": "b"}'):
            call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": arguments}}
            messages: list[Message] = [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
            ]
            try:
                self._render(messages, add_generation_prompt=False, tracking=False)
            except DataError:
                continue
            return not isinstance(arguments, str)
        return None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tracking: bool = False) -> str:
        """Return the text of `messages`; with `tracking`, marks surround the content of `{% generation %}`.

        Arguments of calls are given as the template takes them. Raises DataError with the template's message if it rejects the messages,
        and for one that exceeds a limit.
        """
        normalized: list[dict[str, Any]] = [normalize_message(message) for message in messages]
        if any(message.get("tool_calls") for message in normalized) and self.takes_objects is not None:
            normalized = [with_arguments(message, self.takes_objects) for message in normalized]
        return self._render(normalized, add_generation_prompt=add_generation_prompt, tracking=tracking)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tracking: bool) -> str:
        variables = {
            "messages": messages,
            "tools": self.tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self.tokens,
        }
        today = None if self.today is None else self.today.isoformat()
        try:
            text = SANDBOX.render(self.source, {"variables": variables, "today": today, "tracking": tracking})
            text.encode()
        except Rejected as error:
            raise DataError(f"chat template: rejects the messages ({error})") from None
        except UnicodeEncodeError:
            raise DataError(f"{self.origin}: writes half of a surrogate pair") from None
        return text

    def save(self, folder: Path) -> None:
        """Write the template and its token names to a tokenizer folder in Hugging Face's format."""
        (folder / "chat_template.jinja").write_text(self.source, encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.tokens}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def normalize_message(message: Message) -> dict[str, Any]:
    """Return a message for templates: without null values, and with its reasoning under every known key."""
    present = {key: value for key, value in message.items() if value is not None}
    reasoning = next((present[name] for name in REASONING if name in present), None)
    return present if reasoning is None else {"thinking": reasoning, **present, "reasoning_content": reasoning}


def with_arguments(message: dict[str, Any], as_objects: bool) -> dict[str, Any]:
    """Return a message whose calls have their arguments as objects, or as JSON text. OpenAI's format has text, transformers' objects."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_call_with_arguments(call, as_objects) for call in calls]}


def _call_with_arguments(call: Any, as_objects: bool) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    given = function.get("arguments")
    if as_objects and isinstance(given, str):
        try:
            given = parse_json(given)
        except ValueError:
            return call
        changed = isinstance(given, dict)
    else:
        changed = not as_objects and isinstance(given, dict)
        given = json.dumps(given, ensure_ascii=False) if changed else given
    return {**call, "function": {**function, "arguments": given}} if changed else call


def strip_marks(text: str) -> str:
    """Return rendered text without marks."""
    return text.translate(NO_MARKS)


NO_MARKS = {ord(mark): None for mark in RESERVED}


def load_template(name: str | None, folder: Path, tokens: Mapping[str, str], today: datetime | None = None) -> Template:
    """Return the template `data.template`: None is the tokenizer's own, else chatml, plain, a named one of the tokenizer, or a file.

    Raises DataError if there is none.
    """
    own = templates_in(folder)
    if name is None:
        if "default" in own:
            return Template(*own["default"], tokens, today)
        if own:
            raise DataError(f"{folder}: several chat templates, none named default", fix=f"--data.template {min(own)}")
        raise DataError(
            f"{folder}: the tokenizer has no chat template", fix="--data.template chatml (or plain, or a Jinja file)"
        )
    if name in BUILT_IN:
        return Template(BUILT_IN[name], f"template {name}", tokens, today)
    if name in own:
        return Template(*own[name], tokens, today)
    path = Path(name).expanduser()
    if not path.is_file():
        known = [*BUILT_IN, *own]
        raise DataError(f"data.template: must be a file or one of {', '.join(known)}{nearest(name, known)}", found=repr(name))
    return Template(read_text(path, anywhere=True), str(path), tokens, today)


def templates_in(folder: Path) -> dict[str, tuple[str, str]]:
    """Return the templates of a tokenizer folder: name -> (source, origin). Files override tokenizer_config.json."""
    found: dict[str, tuple[str, str]] = {}
    config = folder / "tokenizer_config.json"
    stored = read_json(config).get("chat_template")
    if isinstance(stored, str):
        found["default"] = (stored, str(config))
    elif isinstance(stored, list):
        try:
            found = {entry["name"]: (entry["template"], f"{config} ({entry['name']})") for entry in stored}
        except (TypeError, KeyError):
            raise DataError(f"{config}: chat_template must be a string, or a list of {{name, template}}") from None
    elif stored is not None:
        raise DataError(f"{config}: chat_template must be a string, or a list of {{name, template}}")
    if (folder / "chat_template.jinja").is_file():
        found = {"default": (read_text(folder / "chat_template.jinja"), str(folder / "chat_template.jinja"))}
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = (read_text(path), str(path))
    return found


def special_token_names(folder: Path) -> dict[str, str]:
    """Return the special tokens (`bos_token`, `eos_token`, ...) of tokenizer_config.json, else of special_tokens_map.json."""
    out: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        content = read_json(folder / file)
        for name in TOKEN_NAMES:
            value = content.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                out[name] = value
    return out


def read_text(path: Path, anywhere: bool = False) -> str:
    """Return the text of a file of a tokenizer folder; `anywhere`, of a file that the user named. Raises DataError."""
    try:
        return read_limited(path if anywhere else owned(path)).decode("utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)})") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; empty if there is no such file. Raises DataError."""
    if not path.is_file():
        return {}
    try:
        content = load_json(owned(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not JSON ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object")
    return content
