"""Secrets of the environment, of recipes and of addresses are in nothing that is printed or saved. The control is the same run without redaction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gptoughts
from gptoughts import console
from gptoughts.cli.main import main
from gptoughts.cli.report import report
from gptoughts.console import HIDDEN
from gptoughts.diagnostics.bench.figures import keep
from gptoughts.engine.distributed import watch

SECRETS = {
    "WANDB_API_KEY": "not-a-real-key-1",
    "HF_TOKEN": "not-a-real-token-2",
    "MY_PASSWORD": "not-a-real-password-3",
    "DB_SECRET": "not-a-real-secret-4",
}
IN_ADDRESS = "https://me:not-a-real-pass-5@host/x"
ALL = [*SECRETS.values(), "not-a-real-pass-5", "hf_" + "a" * 34]
NOTE = " ".join([*ALL[:4], IN_ADDRESS, ALL[-1]])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    Path("text.txt").write_text("some text of a small corpus\n" * 200)
    return tmp_path


def train(run: str) -> None:
    values = {
        "name": "tiny", "note": NOTE, "model.depth": 1, "model.width": 16, "model.heads": 2, "data.path": "text.txt", "data.tokenizer": "bytes",
        "data.sequence_length": 16, "train.steps": 2, "train.global_batch": 2, "optim.warmup_steps": 0, "eval.batches": 1,
        "sample.tokens": 4, "sample.prompt": f"{ALL[0]} ", "track.tags": ALL[1],
    }  # fmt: skip
    layers = {"compile": "eager", "host": "system", "precision": "fp32"}
    gptoughts.train(values, layers=layers, run=run, numerics="off")


def holding(folder: Path) -> dict[str, list[str]]:
    """Return the files below a folder that hold a secret."""
    texts = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: found for name, text in texts.items() if (found := [one for one in ALL if one.encode() in text])}


def test_a_run_prints_and_saves_no_secret(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train("one")
    report(["one"], None)
    main_quietly(["plan", "quickstart", "--track.tags", NOTE, "--json"])
    main_quietly(["compare", "one"])
    text = "".join(capsys.readouterr())
    assert [one for one in ALL if one in text] == []
    assert holding(here) == {}
    assert HIDDEN in Path("out/one/recipe.toml").read_text()
    state = json.loads(next(Path("checkpoints/one").glob("step-*/state.json")).read_text())
    assert HIDDEN in state["run"]["circumstances"]["recipe"]["note"]
    train("one")  # a finished run is found as it was
    assert "differs" not in capsys.readouterr().out


def test_control_without_redaction_the_secrets_are_everywhere(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.Redactor, "__call__", lambda self, value: value)
    train("one")
    report(["one"], None)
    names = {Path(name).name for name in holding(here)}
    assert {"recipe.toml", "state.json", "report.html"} <= names


def main_quietly(words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code


def test_errors_and_tracebacks_print_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", f"./{ALL[0]}.toml"])
    try:
        raise ValueError(f"a key {ALL[1]} in {IN_ADDRESS}")
    except ValueError as error:
        console.print_traceback(type(error), error, error.__traceback__)
    said = capsys.readouterr().err
    assert [one for one in ALL if one in said] == [] and said.count(HIDDEN) == 3 and "ValueError" in said


def test_stacks_and_verdicts_of_a_failed_rank_hold_no_secret(capfd: pytest.CaptureFixture[str]) -> None:
    watch._write(f"rank 1 failed: {NOTE}")
    assert [one for one in ALL if one in capfd.readouterr().err] == []


def test_figures_of_a_benchmark_hold_no_secret(here: Path) -> None:
    keep(Path("figures.json"), {"command": f"gptoughts bench --data.path {IN_ADDRESS}", "machine": ALL[2]}, ("machine",))
    assert holding(here) == {}


def test_a_job_file_with_a_secret_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--dry-run"], []):
        with pytest.raises(SystemExit) as end:
            main(["launch", "slurm", "quickstart", "--track.tags", ALL[0], "--nodes", "1", "--tasks-per-node", "1", *words])
        said = "".join(capsys.readouterr())
        assert end.value.code == 2 and "the job file would hold a secret" in said and ALL[0] not in said
    assert holding(here) == {}
    main_quietly(
        ["launch", "slurm", "quickstart", "--track.tags", "nothing", "--nodes", "1", "--tasks-per-node", "1", "--dry-run"]
    )
