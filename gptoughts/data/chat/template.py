"""A chat template turns messages into the text that a model reads: Jinja, as `apply_chat_template` of transformers renders it.

Templates come with models, so they are untrusted: they run in Jinja's sandbox and see nothing but plain values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from gptoughts.data.text.sources import first_line, require
from gptoughts.errors import DataError, nearest

Message = Mapping[str, Any]

BEGIN_TEXT, END_TEXT, BEGIN_ANSWER, END_ANSWER = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
"""Marks inside rendered text: around a special token that a message only spells, and around what the model shall say.

Unicode keeps these code points out of texts for ever ("noncharacters"), no tokenizer and no template knows them.
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
"""chatml needs a tokenizer with <|im_start|> and <|im_end|>; plain needs nothing but an end-of-text token."""
NEEDED_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>")}
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which data sets keep what a model thought; a template reads one of them and is given all."""
RENDERING_ERRORS = (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)


class Template:
    """A compiled template. `origin` says where it came from; `tokens` are its variables such as `eos_token`.

    `today` is what `strftime_now` tells; None is the clock, as in transformers. Raises DataError where it cannot be compiled.
    """

    def __init__(self, source: str, origin: str, tokens: Mapping[str, str], today: datetime | None = None) -> None:
        self.source, self.origin, self.tokens, self.today = source, origin, dict(tokens), today
        self._tracking = False
        require("jinja2", "train", origin)
        import jinja2

        try:
            environment = self._environment()
            tree = environment.parse(source)
            self._compiled = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"{origin}, line {error.lineno}: not a Jinja template ({first_line(error)})") from None
        from jinja2 import meta, nodes

        variables = meta.find_undeclared_variables(tree)
        self.has_generation_prompt = "add_generation_prompt" in variables
        self.reads_clock = "strftime_now" in source
        self.marks_answers = self._marks_answers
        parts = {node.data for node in tree.find_all(nodes.TemplateData)}
        parts |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        # Joined with a character that no token holds, so that two neighbors never spell a token together.
        self.literals = "\0".join(sorted(parts))

    def _environment(self) -> Any:
        """Jinja's sandbox with what transformers adds: loop controls, `{% generation %}`, tojson, raise_exception, strftime_now."""
        import jinja2
        from jinja2 import ext, nodes, sandbox

        template, self._marks_answers = self, False

        class Generation(ext.Extension):
            """Marks what stands inside `{% generation %}`, while answers are tracked."""

            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser: Any) -> Any:
                template._marks_answers = True
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return nodes.CallBlock(self.call_method("enclosed"), [], [], body).set_lineno(line)

            def enclosed(self, caller: Any) -> str:
                return f"{BEGIN_ANSWER}{caller()}{END_ANSWER}" if template._tracking else caller()

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        def tojson(
            value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
        ) -> str:
            return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

        def strftime_now(form: str) -> str:
            return (template.today or datetime.now()).strftime(form)

        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
        )
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = strftime_now
        return environment

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tracking: bool = False) -> str:
        """The text of `messages`; with `tracking`, marks stand around what the template's `{% generation %}` encloses.

        Raises DataError with the template's own words where it refuses the messages.
        """
        import jinja2

        self._tracking = tracking
        try:
            return self._compiled.render(
                messages=[completed(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.tokens,
            )
        except (jinja2.TemplateError, *RENDERING_ERRORS) as error:
            raise DataError(f"the chat template cannot write it ({first_line(error)})") from None
        finally:
            self._tracking = False

    def save(self, folder: Path) -> None:
        """Writes the template and the names of its tokens into a tokenizer's folder, as Hugging Face tools read them."""
        (folder / "chat_template.jinja").write_text(self.source, encoding="utf-8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.tokens}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def completed(message: Message) -> dict[str, Any]:
    """A message as templates want it: keys without a value left out, and what was thought under all of its names."""
    kept = {key: value for key, value in message.items() if value is not None}
    thought = next((kept[name] for name in REASONING if name in kept), None)
    return kept if thought is None else {"thinking": thought, **kept, "reasoning_content": thought}


def stripped(text: str) -> str:
    """Rendered text without our marks."""
    return text.translate(NO_MARKS)


NO_MARKS = {ord(mark): None for mark in RESERVED}


def load_template(name: str | None, folder: Path, tokens: Mapping[str, str], today: datetime | None = None) -> Template:
    """The template that `data.template` asks for: None is the tokenizer's own, else chatml, plain, one of its names, or a file.

    Raises DataError that says what to type where there is none.
    """
    own = templates_in(folder)
    if name is None:
        if "default" in own:
            return Template(*own["default"], tokens, today)
        if own:
            raise DataError(f"{folder}: several chat templates and no default; type: --data.template {min(own)}")
        raise DataError(
            f"{folder}: the tokenizer has no chat template; type: --data.template chatml (or plain, or a Jinja file)"
        )
    if name in BUILT_IN:
        return Template(BUILT_IN[name], f"template {name}", tokens, today)
    if name in own:
        return Template(*own[name], tokens, today)
    path = Path(name).expanduser()
    if not path.is_file():
        known = [*BUILT_IN, *own]
        raise DataError(f"data.template {name!r}: no such file, and not one of {', '.join(known)}{nearest(name, known)}")
    return Template(read_text(path), str(path), tokens, today)


def templates_in(folder: Path) -> dict[str, tuple[str, str]]:
    """The templates of a tokenizer's folder: name -> (source, origin). Files come before what tokenizer_config.json holds."""
    found: dict[str, tuple[str, str]] = {}
    config = folder / "tokenizer_config.json"
    written = read_json(config).get("chat_template")
    if isinstance(written, str):
        found["default"] = (written, str(config))
    elif isinstance(written, list):
        try:
            found = {entry["name"]: (entry["template"], f"{config} ({entry['name']})") for entry in written}
        except (TypeError, KeyError):
            raise DataError(f"{config}: chat_template must be a text, or a list of name and template") from None
    elif written is not None:
        raise DataError(f"{config}: chat_template must be a text, or a list of name and template")
    if (folder / "chat_template.jinja").is_file():
        found = {"default": (read_text(folder / "chat_template.jinja"), str(folder / "chat_template.jinja"))}
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = (read_text(path), str(path))
    return found


def special_names(folder: Path) -> dict[str, str]:
    """What `bos_token`, `eos_token` and their like are called, by tokenizer_config.json, else by special_tokens_map.json."""
    out: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        content = read_json(folder / file)
        for name in TOKEN_NAMES:
            value = content.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                out[name] = value
    return out


def read_text(path: Path) -> str:
    """A template file's text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object")
    return content
