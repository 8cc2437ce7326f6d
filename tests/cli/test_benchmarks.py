"""`gptoughts eval hellaswag` and `eval lm` as they are typed, and the options of every command against the function that takes them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

from gptoughts.cli.main import build_cli, main
from gptoughts.cli.options import RecipeCommand
from gptoughts.inference.eval import hellaswag
from gptoughts.inference.eval.continuations import encoder_of, tokenizer_settings
from gptoughts.inference.load import load
from tests.support.harness_tasks import local_hellaswag
from tests.support.hellaswag_rows import model_folder, written


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_CACHE_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield tmp_path


def typed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    return printed.out


def test_hellaswag_prints_the_scores_of_the_library(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, rows = str(model_folder(here / "model")), str(written(here / "rows.jsonl"))
    loaded = load(folder)
    encoder = encoder_of(loaded.tokenizer, tokenizer_settings(loaded.recipe, loaded.folder))
    examples = hellaswag.read_examples(rows, 5)
    expected = hellaswag.prepare(encoder, loaded.recipe.data.sequence_length, examples).scores(loaded.engine, batch=4)
    found = json.loads(typed(capsys, "eval", "hellaswag", folder, "--data", rows, "--limit", "5", "--batch", "4", "--json"))
    assert found["rows"] == 5
    assert {name: found[name] for name in expected} == expected
    low, high = found["acc_interval"]
    assert 0 <= low <= found["acc"] <= high <= 1
    text = typed(capsys, "eval", "hellaswag", folder, "--data", rows, "--limit", "5")
    assert "HellaSwag, 5 rows of" in text
    assert f"acc_norm   {expected['acc_norm']:.4f}  95 % interval" in text


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="pip install lm-eval")
def test_lm_prints_a_row_for_each_metric(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, tasks = str(model_folder(here / "model")), local_hellaswag(here / "tasks", written(here / "rows.jsonl"))
    words = ("eval", "lm", folder, "--tasks", "local_hellaswag", "--include", str(tasks), "--task-code", "--limit", "4")
    results = json.loads(typed(capsys, *words, "--json"))["results"]["local_hellaswag"]
    lines = [line.split() for line in typed(capsys, *words).splitlines() if line.startswith("local_hellaswag")]
    assert [(line[1], line[2]) for line in lines] == [
        (name, format(results[f"{name},none"], ".4f")) for name in ("acc", "acc_norm")
    ]


def commands(group: click.Group, name: str = "") -> Iterator[tuple[str, click.Command]]:
    for word, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{name} {word}")
        else:
            yield f"{name} {word}".strip(), command


def test_every_option_is_a_parameter_of_the_function_that_runs_the_command() -> None:
    checked = []
    for name, command in commands(build_cli()):
        target = inspect.getclosurevars(command.callback).nonlocals.get("target")  # type: ignore[arg-type]
        if not isinstance(target, str) or isinstance(command, RecipeCommand):
            continue  # those of a recipe take its fields as flags
        module, _, function = target.partition(".")
        taken = inspect.signature(getattr(import_module(f"gptoughts.cli.{module}"), function)).parameters
        given = {parameter.name for parameter in command.params if parameter.name != "help"}
        needed = {word for word, parameter in taken.items() if parameter.default is parameter.empty}
        assert needed <= given <= set(taken), name
        checked.append(name)
    assert {"eval hellaswag", "eval lm", "eval compare", "generate", "export", "report", "compare"} <= set(checked)
