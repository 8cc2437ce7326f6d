"""What differs between runs, and when their losses may not be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptoughts.cli.main import main
from gptoughts.diagnostics.report.differences import cautions, plan_differences, recipe_differences
from gptoughts.diagnostics.report.locate import RunPlace
from gptoughts.diagnostics.report.run_data import RunData, load_run
from gptoughts.diagnostics.report.summary import results
from tests.support.run_files import write_run


def load(folder: Path) -> RunData:
    return load_run(RunPlace(folder.name, folder, folder / "checkpoints"))


def pair(tmp_path: Path, **second: Any) -> list[RunData]:
    return [load(write_run(tmp_path / "a", steps=20)), load(write_run(tmp_path / "b", steps=20, **second))]


def gptoughts(*words: str) -> int:
    """Run a command in this process. Returns its exit code."""
    with pytest.raises(SystemExit) as left:
        main(list(words))
    return int(left.value.code or 0)


def fingerprinted(run: RunData, text: str) -> None:
    run.fingerprint = text


def test_equal_runs_differ_in_nothing(tmp_path: Path) -> None:
    runs = pair(tmp_path)
    assert cautions(runs) == [] and recipe_differences(runs) == [] and plan_differences(runs) == []


def test_differences_of_recipe_plan_and_result(tmp_path: Path) -> None:
    runs = pair(tmp_path, rate=2e-3, profile="h100-fp8", precision="fp8-te", slower=0.8)
    assert [(one.name, one.values) for one in recipe_differences(runs)] == [("optim.learning_rate", ("0.001", "0.002"))]
    assert {one.name: one.values for one in plan_differences(runs)} == {
        "profile": ("hopper", "h100-fp8"),
        "precision": ("bf16", "fp8-te"),
    }
    changes = {figure.name: figure.changes() for figure in results(runs)}
    assert changes["tokens/s, last 90 % of the steps"] == ["+25.0 %"] and changes["steps"] == [""]
    assert cautions(runs) == []


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"path": "songs.txt"}, "data.path (a: books.txt, b: songs.txt)"),
        ({"tokenizer": "bytes"}, "tokenizers differ: data.tokenizer (a: gpt2, b: bytes)"),
        ({"objective": "masked-diffusion"}, "objectives differ (a: next-token, b: masked-diffusion)"),
    ],
)
def test_other_data_tokenizer_or_objective_is_a_caution(second: dict[str, str], words: str, tmp_path: Path) -> None:
    (line,) = cautions(pair(tmp_path, **second))
    assert words in line


def test_fingerprints_of_the_data_decide_where_checkpoints_have_them(tmp_path: Path) -> None:
    runs = pair(tmp_path, path="moved/books.txt")
    assert len(cautions(runs)) == 1
    fingerprinted(runs[0], "f"), fingerprinted(runs[1], "f")
    assert cautions(runs) == []
    runs = pair(tmp_path / "same path, other text")
    fingerprinted(runs[0], "f"), fingerprinted(runs[1], "g")
    assert cautions(runs) == ["training data differ: other tokens under equal settings"]


def test_the_fingerprint_is_read_from_the_newest_checkpoint(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=5)
    for step, text in ((1, "old"), (2, "new")):
        path = folder / "checkpoints" / f"step-{step:06d}" / "state.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"run": {"progress": {"cursor": {"samples": 1, "fingerprint": text}}}}), encoding="utf-8")
    assert load(folder).fingerprint == "new"


def test_an_unknown_recipe_is_a_caution(tmp_path: Path) -> None:
    runs = pair(tmp_path)
    runs[1].recipe = {}
    assert cautions(runs) == ["no recipe.toml in b: unknown whether data and tokenizer are the same"]


def test_compare_says_first_that_losses_are_not_comparable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pair(tmp_path / "out", path="songs.txt", rate=2e-3)
    assert gptoughts("compare", "a", "b") == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "caution: these losses are not comparable: data settings differ: data.path (a: books.txt, b: songs.txt)"
    )
    assert "optim.learning_rate   0.001      0.002" in printed and "plan: no difference" in printed
    assert gptoughts("report", "a", "b", "--to", "both.html") == 0
    assert "caution: these losses are not comparable" in capsys.readouterr().out
    assert "Caution: these losses are not comparable" in (tmp_path / "both.html").read_text(encoding="utf-8")


def test_one_run_is_printed_without_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gptoughts("compare", str(write_run(tmp_path / "a\x1b[31m", steps=20))) == 0
    printed = capsys.readouterr().out
    assert "validation loss" in printed and "differs" not in printed and "\x1b" not in printed


@pytest.mark.parametrize("out", ["missing/x.html", "."])
def test_a_file_that_cannot_be_written_is_an_error(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "a", steps=5)
    assert gptoughts("report", str(folder), "--to", str(tmp_path / out)) == 2
    assert "error: --to" in capsys.readouterr().err
