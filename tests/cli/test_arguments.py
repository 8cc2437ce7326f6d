"""Values of options that no command can use: empty ones, bytes that are not UTF-8, numbers beyond every use."""

from __future__ import annotations

import os
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

from gptoughts.cli.generate import _standard_input
from gptoughts.cli.main import main
from gptoughts.errors import ConfigError, RunError
from gptoughts.run.tracking.run_dir import run_folder
from tests.cli.test_main import here

__all__ = ["here"]

EMPTY = [
    (["train", "quickstart", "--run-dir", ""], "--run-dir: empty"),
    (["train", "quickstart", "--resume="], "--resume: empty"),
    (["train", "quickstart", "--name", ""], "--name: empty"),
    (["train", "quickstart", "--data.path", ""], "data.path: must not be empty"),
    (["train", "quickstart", "--data.cache="], "data.cache: must not be empty"),
    (["plan", ""], "recipe: empty"),
    (["plan", "--profile", ""], "--profile: empty"),
    (["plan", "--plugin", ""], "--plugin: empty"),
    (["verify-resume", "--run-dir", ""], "--run-dir: empty"),
    (["tokenize", "", "--to", "x"], "source: empty"),
    (["tokenize", "x", "--to", ""], "--to: empty"),
    (["generate", ""], "checkpoint: empty"),
    (["generate", "x", "--offload", ""], "--offload: empty"),
    (["export", "x", "--to="], "--to: empty"),
    (["eval", "perplexity", "x", "--data", ""], "--data: empty"),
    (["launch", "slurm", "quickstart", "--site", ""], "--site: empty"),
]


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must end with code 2 and write nothing; return what it said."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    told = capsys.readouterr()
    assert (ended.value.code, told.out) == (2, "") and told.err.startswith("error: ")
    assert list(Path().iterdir()) == []
    return told.err


@pytest.mark.parametrize(("words", "expected"), EMPTY, ids=[" ".join(words) for words, _ in EMPTY])
def test_an_empty_value_is_refused(words: list[str], expected: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(words, capsys)


def test_an_empty_prompt_and_an_empty_list_have_a_meaning(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "empty" not in refused(["generate", "none", "--prompt", ""], capsys)
    with pytest.raises(SystemExit) as ended:
        main(["plan", "quickstart", "--eval.tasks=", "--sample.prompt", ""])
    assert ended.value.code == 0, capsys.readouterr().err


FOREIGN = os.fsdecode(b"\xff")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["generate", "x", "--prompt", FOREIGN], r"--prompt: not UTF-8. Found '\udcff'"),
        (["train", "quickstart", "--sample.prompt", FOREIGN], "--sample.prompt: not UTF-8"),
        (["train", "quickstart", "--name", FOREIGN], "--name: not UTF-8"),
        (["launch", "slurm", "quickstart", "--name", FOREIGN], "--name: not UTF-8"),
        (["generate", "x", "--seed", str(10**30)], "--seed"),
        (["generate", "x", "--memory", "1e300"], "--memory"),
        (["plan", "quickstart", "--seed", str(10**30)], f"less than {2**63}"),
    ],
)
def test_an_unusable_value_is_refused(words: list[str], expected: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(words, capsys)


def test_standard_input_that_is_not_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for errors in ("strict", "surrogateescape"):
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"a\xff\x00"), "utf-8", errors))
        with pytest.raises(ConfigError, match="--prompt -: standard input is not UTF-8"):
            _standard_input()
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO("é".encode()), "utf-8"))
    assert _standard_input() == "é"


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", FOREIGN, "n" * 256, "a/b", ".a", ""])
def test_a_name_that_no_run_folder_can_have_is_refused(name: str) -> None:
    with pytest.raises(RunError, match="is not a folder name") as refusal:
        run_folder(name, None)
    assert str(refusal.value).count("\n") == 1 and str(refusal.value).replace("\n", "").isprintable()


def test_a_pipe_is_not_a_missing_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(here / "pipe.toml")
    with pytest.raises(SystemExit) as ended:
        main(["plan", "pipe.toml"])
    assert ended.value.code == 2 and "recipe pipe.toml: not a regular file" in capsys.readouterr().err
