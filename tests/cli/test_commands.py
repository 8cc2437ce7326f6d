"""From text to words through the command line: train, generate, evaluate, and every refusal on the way."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support import warm

WORDS = "the cat sat on the mat and the dog sat on the log while it rained\n"
FLAGS = [
    "--model.width", "32",
    "--model.heads", "2",
    "--model.depth", "2",
    "--data.sequence-length", "32",
    "--train.steps", "30",
    "--log.every", "10",
    "--eval.every", "15",
    "--sample.tokens", "8",
    "--save.every", "15",
]  # fmt: skip


def gptoughts(*words: str, cwd: Path, given: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    line = warm.command(*words, environment=variables)
    return subprocess.run(line, cwd=cwd, env=variables, input=given, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a finished run named `words` in it."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "text.txt").write_text(WORDS * 120, encoding="utf-8")
    ran = gptoughts(
        "train", "shakespeare-char", "--data.path", "text.txt", "--data.cache", "cache", "--name", "words", *FLAGS, cwd=folder
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    (folder / "said").write_text(ran.stdout, encoding="utf-8")
    return folder


def test_a_run_says_where_things_are_and_what_was_reached(place: Path) -> None:
    said = (place / "said").read_text(encoding="utf-8")
    assert re.search(r"^layer +status +proof$", said, re.MULTILINE)
    assert "proof" in said
    assert "unigram entropy of the same tokens" in said
    assert "out/words" in said
    assert "checkpoints/words/step-000030" in said
    assert {"plan.json", "evidence.json", "metrics.jsonl", "recipe.toml", "loss.png"} <= {
        path.name for path in (place / "out" / "words").iterdir()
    }
    rows = [json.loads(line) for line in (place / "out" / "words" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 10, 20, 30]
    assert [row["step"] for row in rows if "eval/loss" in row] == [15, 30]
    evidence = json.loads((place / "out" / "words" / "evidence.json").read_text())
    assert all(line["status"] == "active" for line in evidence["layers"])
    assert json.loads((place / "checkpoints" / "words" / "best").read_text())["checkpoint"] == "step-000030"


def test_the_resolved_recipe_tells_where_values_came_from_and_can_be_trained_again(place: Path) -> None:
    text = (place / "out" / "words" / "recipe.toml").read_text(encoding="utf-8")
    assert "width = 32  # --model.width" in text
    assert "recipes/shakespeare-char.toml" in text
    ran = gptoughts("train", "out/words/recipe.toml", "--name", "again", cwd=place)
    assert ran.returncode == 0, ran.stderr
    first, second = (
        [json.loads(line).get("train/loss") for line in (place / "out" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("words", "again")
    )
    assert first == second


def test_generation_streams_the_same_text_for_the_same_seed(place: Path) -> None:
    asked = ("generate", "words", "--prompt", "the ", "--tokens", "20", "--seed", "5")
    one, two = gptoughts(*asked, cwd=place), gptoughts(*asked, cwd=place)
    assert one.returncode == 0, one.stderr
    assert one.stdout == two.stdout
    assert one.stdout.startswith("the ")
    assert len(one.stdout.rstrip("\n")) == len("the ") + 20
    other = gptoughts(*asked[:-1], "6", cwd=place)
    assert other.stdout != one.stdout


def test_several_prompts_and_standard_input_and_a_checkpoints_own_folder(place: Path) -> None:
    ran = gptoughts(
        "generate", "checkpoints/words/step-000015", "--prompt", "the ", "--prompt", "-", "--tokens", "5", "--temperature", "0",
        cwd=place, given="and the",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("the ")
    assert "\nand the" in ran.stdout
    from_run_dir = gptoughts("generate", "checkpoints/words", "--tokens", "5", cwd=place)
    assert from_run_dir.returncode == 0, from_run_dir.stderr


def test_perplexity_over_a_whole_split_and_over_other_text(place: Path) -> None:
    ran = gptoughts("eval", "perplexity", "words", "--json", cwd=place)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    rows = [json.loads(line) for line in (place / "out" / "words" / "metrics.jsonl").read_text().splitlines()]
    logged = [row["eval/loss"] for row in rows if "eval/loss" in row][-1]
    assert found["loss"] == pytest.approx(logged, rel=1e-3)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    (place / "other.txt").write_text("the dog and the cat sat on the mat\n" * 40, encoding="utf-8")
    other = gptoughts("eval", "perplexity", "words", "--data", "other.txt", "--split", "train", cwd=place)
    assert other.returncode == 0, other.stderr
    assert "perplexity" in other.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("generate", "wrods"), "did you mean 'words'?"),
        (("generate", "words", "--prompt", "Ü"), "Ü"),
        (("generate", "words", "--temperature", "-1"), "temperature"),
        (("generate", "out"), "out: no checkpoint"),
        (("eval", "perplexity", "words", "--split", "test"), "--split 'test': not in"),
        (("eval", "perplexity", "words", "--data", "absent.txt"), "absent.txt"),
    ],
)
def test_what_cannot_be_is_one_message(place: Path, words: tuple[str, ...], expected: str) -> None:
    ran = gptoughts(*words, cwd=place)
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert expected in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("content", "flags", "expected"),
    [
        (None, (), "text.txt"),
        (b"", (), "empty"),
        (b"abc\0def" * 50, (), "NUL"),
        (b"caf\xe9 " * 50, (), "UTF-8"),
        (b"short", (), "shorter than one batch"),
        (WORDS.encode() * 120, ("--model.vocab-size", "5"), "vocab"),
        (WORDS.encode() * 120, ("--objective", "next-word"), "objective: unknown (did you mean 'next-token'?)"),
        (WORDS.encode() * 120, ("--model.family", "gtp"), "did you mean"),
        (WORDS.encode() * 120, ("--data.tokenizer", "absent.json"), "absent.json"),
    ],
)
def test_bad_text_and_words_leave_no_checkpoint(
    tmp_path: Path, content: bytes | None, flags: tuple[str, ...], expected: str
) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    ran = gptoughts(
        "train",
        "shakespeare-char",
        "--data.path",
        "text.txt",
        "--data.cache",
        "cache",
        "--name",
        "bad",
        *FLAGS,
        *flags,
        cwd=tmp_path,
    )
    assert ran.returncode == 2, ran.stdout[-500:] + ran.stderr[-1500:]
    assert expected in ran.stderr, ran.stderr
    assert "Traceback" not in ran.stderr
    assert not list(tmp_path.glob("checkpoints/bad"))
    assert not list(tmp_path.glob("out/bad"))


def test_a_run_can_be_as_long_as_the_clock_says(place: Path) -> None:
    ran = gptoughts(
        "train", "shakespeare-char", "--data.path", "text.txt", "--data.cache", "cache", "--name", "clock", "--model.width", "32",
        "--model.heads", "2", "--model.depth", "2", "--data.sequence-length", "32", "--train.hours", "0.003", "--sample.tokens", "4",
        cwd=place,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in (place / "out" / "clock" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "train/loss" in row][-1]
    before = [row for row in rows if "train/loss" in row][-2]
    assert last["train/seconds"] >= 0.003 * 3600 > before["train/seconds"]
