"""docs/coming-from.md is true: each of its commands runs, at toy size, and its table agrees with what the command line answers.

Lines of its ```sh blocks are run as they stand but for what a machine without network and GPU cannot have: names of models and files
(`STANDS_FOR`), sizes and lengths (`small`), and `--ranks`, in whose place the plan for the ranks is made and one process trains.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptoughts.cli.main import build_cli, main
from gptoughts.config import model_spec as facts
from gptoughts.config.aliases import our_flag
from gptoughts.config.loader import load
from tests.support.toy_files import make_toys, sizes

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
LLADA = (ROOT / "docs" / "llada.md").read_text(encoding="utf-8")

STANDS_FOR = {
    "huggyllama/llama-7b": "tiny",
    "/path/to/your/training_data.txt": "my-text.txt",
    "50000": "300",
    "gpt2": "bytes",  # its files are downloaded once
}
ELSEWHERE = {"hf": "a hub is not asked here; what it would bring is made below"}
"""First words of lines that are left out, and why."""

# --- what stands in the page


def sections() -> dict[str, list[list[str]]]:
    """Heading -> the words of each of its commands."""
    found = {}
    for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        lines = "\n".join(re.findall(r"^```sh\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)).splitlines()
        if lines:
            found[part.partition("\n")[0]] = [shlex.split(line) for line in lines]
    return found


SECTIONS = sections()


def small(words: list[str]) -> list[str]:
    """A `train` line with the last word on everything that costs time."""
    length = [] if "--train.epochs" in words else ["--train.steps", "2"]
    return [*words, *sizes(words[1], words), *length, "--profile", "auto"]


# --- the toys


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with everything that the page's commands name."""
    here = tmp_path_factory.mktemp("toys")
    before, cache = Path.cwd(), os.environ.get("XDG_CACHE_HOME")
    os.chdir(here)
    os.environ["XDG_CACHE_HOME"] = str(here / "cache")
    make_toys(here)
    yield here
    os.chdir(before)
    os.environ.pop("XDG_CACHE_HOME") if cache is None else os.environ.update(XDG_CACHE_HOME=cache)


# --- the tests


def gptoughts(words: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 0, shlex.join(words)


@pytest.mark.parametrize("section", SECTIONS)
def test_commands_of_the_page_run(section: str, toys: Path) -> None:
    for words in SECTIONS[section]:
        words = [STANDS_FOR.get(word, word) for word in words]
        if "--ranks" in words:
            ranks, words = words[words.index("--ranks") + 1], without(words, "--ranks")
            planned = [*words[2:], "--ranks", ranks, "--machine", "tests/machines/h100x8.json"]
            planned += ["--model.path", "encoder", "--data.sequence-length", "48"] if "bert-squad" in words else []
            gptoughts(["plan", *without(planned, "--name")])
        elif "h100-fp8" in words:
            gptoughts(["plan", *words[2:], "--machine", "tests/machines/h100.json"])
        if words[0] == "gptoughts":
            shorter = {
                "train": small,
                "doctor": lambda line: [*line, "--quick"],
            }  # all of doctor: tests/diagnostics/test_doctor.py
            gptoughts(shorter.get(words[1], list)(words[1:]))
        elif words[0] not in ELSEWHERE:
            assert subprocess.run(words, check=False, capture_output=True).stdout, shlex.join(words)


def without(words: list[str], flag: str) -> list[str]:
    """`words` without `flag` and its value."""
    if flag not in words:
        return words
    place = words.index(flag)
    return [*words[:place], *words[place + 2 :]]


def test_sections_have_their_commands() -> None:
    assert len(SECTIONS) == 5
    firsts = {words[0] for lines in SECTIONS.values() for words in lines}
    assert firsts == {"gptoughts", "tail", *ELSEWHERE}


def test_table_of_flags_agrees_with_the_answers() -> None:
    table = PAGE.split("\n## Flags\n")[1].split("\n## ")[0]
    rows = [
        re.findall(r"`([^`]+)`", cell) for line in table.splitlines() if line.startswith("| `") for cell in line.split("|")[1:3]
    ]
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    assert len(pairs) > 30
    known = {flag for name in ("train", "generate", "tokenize") for flag in flags_of(name)}
    for theirs, here in pairs:
        flags = [word.split(" ")[0] for word in here if word.startswith("--")]
        assert all(flag in known for flag in flags), here
        for word in theirs:
            answer = our_flag(word.split(" ")[0])
            assert not (answer and flags) or any(flag in answer for flag in flags), (
                f"{word}: the page says {flags}, the command line {answer}"
            )


def flags_of(name: str) -> list[str]:
    command = build_cli().commands[name]
    return [
        flag
        for parameter in command.get_params(command.make_context(name, [], resilient_parsing=True))
        for flag in parameter.opts
    ]


def test_sizes_of_the_diffusion_recipes_are_those_of_the_page() -> None:
    rows = re.findall(r"^\| `(llada-\w+)` \|(.*)\|$", LLADA, re.MULTILINE)
    assert {name for name, _ in rows} == {"llada-tiny", "llada-small", "llada-medium", "llada-large"}
    for name, cells in rows:
        depth, width, heads, length, words, parameters = (
            int(re.match(r"[\d,]+", cell.strip())[0].replace(",", "")) for cell in cells.split("|")
        )
        model, data = load(name).recipe.model, load(name).recipe.data
        assert (depth, width, heads, length) == (model.depth, model.width, model.heads, data.sequence_length)
        found = facts.of(model, length, 67 if name == "llada-tiny" else 50258)
        assert (words, parameters) == (found.vocab_size, found.parameters)
