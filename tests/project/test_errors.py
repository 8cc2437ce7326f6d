"""Every error follows one formula: `<option or file>: <problem>. Found <x>. Try: <command>`."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from gptoughts import errors
from gptoughts.errors import GptoughtsError, describe
from tests.support.golden_files import ROOT

CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GptoughtsError)]
FILES = sorted((ROOT / "gptoughts").rglob("*.py"))
LOCATED_BY_THE_CALLER = {
    "gptoughts/cli/options.py": "click prints the flag first",
    "gptoughts/data/chat/conversations.py": "the reader puts file and row first",
    "gptoughts/data/chat/formats.py": "the reader puts file and row first",
    "gptoughts/data/chat/tokenizer.py": "the reader puts file and row first",
    "gptoughts/data/tokenizers/tokenizer.py": "the reader puts file and document first",
    "gptoughts/layers/plugins.py": "`extensions` puts --plugin FILE first",
}
"""Files whose problems get their first part from the caller, and how."""
OLD_WAYS = (r", here ", r"\btry: ", r"; type: ", r"here there is")
"""Found values and fixes written into the problem by hand."""


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_writes_problem_found_and_fix(kind: type[GptoughtsError]) -> None:
    assert str(kind("--ranks: not a multiple of 8")) == "--ranks: not a multiple of 8"
    assert str(kind("--ranks: not a multiple of 8", found=3)) == "--ranks: not a multiple of 8. Found 3"
    assert str(kind("--ranks: not a multiple of 8", fix="--ranks 8")) == "--ranks: not a multiple of 8.\n  Try: --ranks 8"
    assert str(kind("a: b", found="c", fix="d")) == "a: b. Found c.\n  Try: d"
    assert str(kind("a:\n  b", fix="d")) == "a:\n  b\n  Try: d"
    assert kind.exit_code in (2, 3, 74)  # 74: the disk, see docs/checkpoints.md


def test_problems_of_a_list_stay_on_one_line() -> None:
    assert describe("a: b", 3, "d") == "a: b. Found 3. Try: d"
    assert str(errors.listed("recipe", ["a: b", "c: d"])) == "recipe:\n  a: b\n  c: d"
    assert str(errors.listed("recipe", ["a: b"])) == "recipe: a: b"


def names() -> set[str]:
    """Names of the error classes, subclasses elsewhere in the package included, and of the function `describe`."""
    found = {kind.__name__ for kind in CLASSES}
    for node in (node for path in FILES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
        if isinstance(node, ast.ClassDef) and found & {base.id for base in node.bases if isinstance(base, ast.Name)}:
            found.add(node.name)
    return found | {"describe"}


@cache
def problems() -> list[tuple[str, str]]:
    """(place, text) of every problem that the package writes as a literal; parts that are computed are `{}`."""
    known, found = names(), []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known and node.args:
                text = literal(node.args[0])
                if text is not None:
                    found.append((f"{path.relative_to(ROOT)}:{node.lineno}", text))
    return found


def literal(node: ast.expr) -> str | None:
    """The text of a string literal or f-string, also one that is added up; None for what is computed as a whole."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left = literal(node.left)
        return None if left is None else left + (literal(node.right) or "{}")
    return None


def test_there_are_many_errors_to_check() -> None:
    assert len(problems()) > 300 and {"WorkerDied", "OutOfMemory", "InvalidRow"} <= names()


def test_every_problem_begins_with_what_is_at_fault() -> None:
    """The option, key, file or layer comes first and ends with a colon; a value that stands for it may be computed."""
    elsewhere = tuple(f"{file}:" for file in LOCATED_BY_THE_CALLER)
    first_line = ((place, text.split("\n")[0]) for place, text in problems() if not place.startswith(elsewhere))
    assert [(place, text) for place, text in first_line if not re.match(r"[^:]{1,90}:(\s|$)|\{\}", text)] == []


@pytest.mark.parametrize("pattern", OLD_WAYS)
def test_found_values_and_fixes_are_arguments(pattern: str) -> None:
    assert [(place, text) for place, text in problems() if re.search(pattern, text)] == []


def test_no_problem_ends_with_a_period() -> None:
    """The formula adds it."""
    assert [(place, text) for place, text in problems() if text.rstrip().endswith(".") and not text.endswith("...")] == []
