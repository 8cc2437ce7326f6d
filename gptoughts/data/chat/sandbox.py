"""Compile and render chat templates in a child process with limits on CPU time, memory and output.

A template comes with a model. Jinja's sandbox keeps it from running code, but not from looping for ever or from filling the memory:
`{{ 'a' * 10**10 }}` does while it is compiled. One child serves all templates of a process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from typing import Any

from gptoughts.errors import DataError
from gptoughts.processes import LimitedChild, LimitExceeded

BEGIN_ANSWER, END_ANSWER = "\ufdd2", "\ufdd3"
"""Marks around the content of `{% generation %}`."""
MAX_SECONDS = 10
"""CPU time of one rendering; the longest conversations of published data sets take milliseconds."""
MAX_MEMORY = 2 << 30
"""Address space of the child: a rendering at the limit of its output takes about a quarter."""
MAX_CHARACTERS = 64 << 20
"""Characters of a rendered conversation, and of a template's source."""
ERRORS = (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)
LIMITS = f"{MAX_SECONDS} s of CPU time, {MAX_MEMORY >> 30} GiB of memory, {MAX_CHARACTERS:,} characters"


class Rejected(DataError):
    """The template's own error. `line` is that of a syntax error."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


class Sandbox:
    """The child process that compiles and renders the templates of this process."""

    def __init__(self, seconds: int = MAX_SECONDS) -> None:
        self._child = LimitedChild(__name__, "answering", seconds, MAX_MEMORY)
        self._known = set[str]()

    def compile(self, source: str, origin: str) -> dict[str, Any]:
        """Return what a template reads: variables, whether it marks answers, its literal parts. Raises Rejected, DataError."""
        if len(source) > MAX_CHARACTERS:
            raise DataError(f"{origin}: chat template too long", found=f"{len(source):,} characters")
        found: dict[str, Any] = self._asked(source, {}, origin)
        return found

    def render(self, source: str, request: Mapping[str, Any]) -> str:
        """Return the rendered text of `request`: variables, today, tracking. Raises Rejected, DataError."""
        text: str = self._asked(source, request, "chat template")
        return text

    def _asked(self, source: str, request: Mapping[str, Any], origin: str) -> Any:
        name = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        with self._child.lock:
            if not self._child.is_running:
                self._known.clear()
            try:
                answer = self._child.ask({"name": name, "source": None if name in self._known else source, **request})
            except LimitExceeded as error:
                raise DataError(
                    f"{origin}: {error}", found=f"more than {LIMITS}", fix="--data.template chatml, or another file"
                ) from None
            if "error" in answer:
                raise Rejected(answer["error"], answer.get("line"))
            self._known.add(name)
            return answer["value"]


SANDBOX = Sandbox()


# --- in the child


def answering() -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return the function that answers the requests of a Sandbox."""
    return partial(_answer, {})


def _answer(compiled: dict[str, Compiled], request: Mapping[str, Any]) -> dict[str, Any]:
    import jinja2

    try:
        if request["source"] is not None:
            compiled[request["name"]] = Compiled(request["source"])
        found = compiled[request["name"]]
        return {"value": found.render(request) if "variables" in request else found.reads}
    except TooLong:
        return {"limit": "writes too much"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": _first_line(error), "line": error.lineno}
    except (jinja2.TemplateError, *ERRORS) as error:
        return {"error": _first_line(error)}


class TooLong(Exception):
    """The output exceeds the limit."""


class Compiled:
    """A template as transformers compiles it: loop controls, `{% generation %}`, tojson, raise_exception and strftime_now."""

    def __init__(self, source: str) -> None:
        from jinja2 import meta, nodes

        self.today: datetime | None = None
        self.tracking = self.marks_answers = False
        environment = self._environment()
        tree = environment.parse(source)
        self._template = environment.from_string(source)
        parts = {node.data for node in tree.find_all(nodes.TemplateData)}
        parts |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        self.reads = {
            "variables": sorted(meta.find_undeclared_variables(tree)),
            "marks_answers": self.marks_answers,
            # Joined with NUL, which is in no token, so that adjacent parts never form a token.
            "literals": "\0".join(sorted(parts)),
        }

    def _environment(self) -> Any:
        import jinja2
        from jinja2 import ext, nodes, sandbox

        template = self

        class Generation(ext.Extension):
            """`{% generation %}`: marks its content while answers are tracked."""

            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser: Any) -> Any:
                template.marks_answers = True
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return nodes.CallBlock(self.call_method("enclosed"), [], [], body).set_lineno(line)

            def enclosed(self, caller: Any) -> str:
                return f"{BEGIN_ANSWER}{caller()}{END_ANSWER}" if template.tracking else caller()

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

    def render(self, request: Mapping[str, Any]) -> str:
        """Return the text. Raises TooLong, and errors of Jinja and of the template."""
        self.today = None if request["today"] is None else datetime.fromisoformat(request["today"])
        self.tracking = request["tracking"]
        parts, length = [], 0
        for part in self._template.generate(**request["variables"]):
            length += len(part)
            if length > MAX_CHARACTERS:
                raise TooLong
            parts.append(part)
        return "".join(parts)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
