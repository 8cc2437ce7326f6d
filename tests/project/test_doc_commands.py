"""Every `gptoughts` line of the documentation parses: commands, flags, values, recipes, profiles, layers and files exist. Nothing is run.

tests/project/test_docs.py executes the same lines in the slow tier.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from typing import Any

import click
import pytest

from gptoughts.cli.main import build_cli
from gptoughts.cli.options import split_flags
from gptoughts.config.loader import load
from gptoughts.errors import GptoughtsError
from gptoughts.layers.plugins import extensions
from gptoughts.planning.layer import SLOTS
from gptoughts.planning.profile import find
from tests.support.golden_files import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HERE_DOCUMENT = re.compile(r"<<-?\s*'?(\w+)'?.*?^\1$", re.MULTILINE | re.DOTALL)


def command_lines(text: str) -> Iterator[str]:
    """Yield the `gptoughts` commands of a page's bash blocks, one per line, without redirections and here-documents."""
    for block in FENCE.findall(text):
        for line in HERE_DOCUMENT.sub("", block).replace("\\\n", " ").splitlines():
            yield from (part for part in _commands(line) if part)


def _commands(line: str) -> Iterator[str]:
    """Yield the commands of a line that start gptoughts, split at `&&`, `||`, `;` and `|`."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("&|;()"):
            yield _ours(words)
            words = []
        else:
            words.append(word)


def _ours(words: list[str]) -> str:
    """Return the arguments of gptoughts as one line, or nothing for another program."""
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    if words[:1] == ["torchrun"] and "gptoughts" in words:
        words = words[words.index("gptoughts") :]
    elif words[:3] == ["python", "-m", "gptoughts"]:
        words = words[2:]
    elif words[:1] == ["launch/quickstart.sh"]:
        words = ["gptoughts", "train", *words[1:]]
    if words[:1] != ["gptoughts"]:
        return ""
    if ">" in words:
        words = words[: words.index(">")]
    return shlex.join(words[1:])


LINES = [(page.name, line) for page in PAGES for line in dict.fromkeys(command_lines(page.read_text(encoding="utf-8")))]


@cache
def tree() -> click.Group:
    return build_cli()


def parsed(words: list[str]) -> dict[str, Any]:
    """Return the parameters of a command line. Raises click's errors and ConfigError for what is unknown."""
    command: click.Command = tree()
    context = click.Context(command, info_name="gptoughts")
    while isinstance(command, click.Group):
        name, found, words = command.resolve_command(context, words)
        assert found is not None and name is not None
        command, context = found, click.Context(found, info_name=f"{context.info_name} {name}")
    with command.make_context(context.info_name, list(words)) as made:
        return dict(made.params)


def check(words: list[str]) -> None:
    """Raise for a command, flag, value, recipe, profile or layer that does not exist."""
    if words in (["--help"], ["--version"]):
        return
    values = parsed(words)
    fields, layers, rest = split_flags(values)
    if "recipe" in rest or fields:
        load(rest.get("recipe") or "quickstart", fields)
    if rest.get("profile") not in (None, "auto") and not str(rest["profile"]).endswith(".toml"):
        find(rest["profile"])
    plugins = [str(ROOT / file) for file in rest.get("plugin") or ()]
    catalog = extensions(plugins).catalog
    for slot, name in layers.items():
        if slot in SLOTS:
            known = [layer.name for layer in catalog.values() if layer.slot == slot]
            assert name in known, f"--layer.{slot} {name}: not one of {', '.join(known)}"
    machine = rest.get("machine") or ""
    assert not machine.startswith("tests/") or (ROOT / machine).is_file(), f"--machine {machine}: no such file"
    if words[0] in ("layers", "profiles", "recipes") and rest.get("name"):
        {"layers": catalog.__getitem__, "profiles": find, "recipes": load}[words[0]](rest["name"])


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line[:60]}" for page, line in LINES])
def test_it_parses(page: str, line: str) -> None:
    check(shlex.split(line))


def test_lines_are_found() -> None:
    assert len(LINES) > 40
    text = (
        "```bash\nA=1 gptoughts plan quickstart > x.json && gptoughts layers  # all\n"
        "for n in 1; do echo gptoughts; done\ncat > a <<'END'\ngptoughts no\nEND\n"
        "torchrun --nproc-per-node 8 -m gptoughts train \\\n  gpt-1b\n```\n```text\ngptoughts nothing\n```\n"
    )
    assert list(command_lines(text)) == ["plan quickstart", "layers", "train gpt-1b"]


@pytest.mark.parametrize(
    "line",
    [
        "no-such-command", "bench no-such", "plan no-such-recipe", "plan quickstart --no-such-flag", "train quickstart --train.stepz 3",
        "train quickstart --train.steps many", "train quickstart --train.steps 0", "plan quickstart --profile no-such",
        "plan quickstart --layer.precision bf61", "layers no-such", "profiles no-such", "recipes no-such", "tokenize x", "plan --machine tests/machines/no-such.json",
        "train quickstart --numerics maybe", "generate", "plan quickstart extra",
    ],
)  # fmt: skip
def test_a_wrong_line_is_noticed(line: str) -> None:
    with pytest.raises((GptoughtsError, click.ClickException, KeyError, AssertionError)):
        check(shlex.split(line))
