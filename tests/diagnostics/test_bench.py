"""`gptoughts bench`: what is compared is the same training, the figures are whole, and a file of them is updated, never lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoughts.api import decide
from gptoughts.cli.main import main
from gptoughts.diagnostics.bench.figures import keep, paired, spread
from gptoughts.diagnostics.bench.outside import put_clock_on
from gptoughts.diagnostics.bench.plain import Settings, plain_loop
from gptoughts.diagnostics.bench.step import AGAIN, FP32, OURS, PLAIN, Subject, bench_step, plain_settings
from gptoughts.diagnostics.bench.table import step_table
from gptoughts.engine.trainer import Progress, train
from gptoughts.errors import ConfigError
from tests.support.bench_settings import fields_in


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, str]:
    """A tiny recipe over a text of its own; logged every step."""
    return {**fields_in(tmp_path), "log.every": "1"}


def setting_of(fields: dict[str, str], **layers: str) -> Any:
    """The tiny recipe's setting; threads stay as the test session has them."""
    return decide("quickstart", fields=fields, layers={"host": "system", **layers})


@pytest.mark.parametrize("layers", [{}, {"microbatch": "fixed", "microbatch.sequences": "2"}], ids=["whole", "sliced"])
def test_plain_loop_is_the_same_training(fields: dict[str, str], layers: dict[str, str]) -> None:
    """Step for step the same loss, so that speeds may be compared at all."""
    setting = decide("quickstart", fields=fields, layers={"host": "system", **layers})
    subject = Subject(setting)
    with subject.engine(subject.recipe, setting.plan) as engine:
        settings = plain_settings(setting.plan, engine)
        losses: list[float] = []

        class Losses:
            touches_weights = False
            on_stop = True

            def due(self, step: int, last: bool) -> bool:
                return True

            def run(self, engine: Any, progress: Any, stats: Any, last: bool) -> None:
                losses.append(float(stats.loss_sum / stats.weight))

        train(engine, Progress(), lambda now: now.step >= 4, subject.length.rate, [Losses()])
    rate = subject.length.rate
    run = plain_loop(
        subject.recipe, subject.parts.family, subject.rows, subject.batches(subject.recipe), torch.device("cpu"), settings,
        lambda step: rate(Progress(step=step)),
    )  # fmt: skip
    assert [run(1) for _ in range(4)] == pytest.approx(losses, abs=1e-5)


def test_settings_of_the_plain_loop_follow_the_plan(fields: dict[str, str]) -> None:
    setting = setting_of(fields, precision="bf16", attention="math", optimizer="plain", microbatch="fixed")
    subject = Subject(setting)
    with subject.engine(subject.recipe, setting.plan) as engine:
        assert plain_settings(setting.plan, engine) == Settings(4, torch.bfloat16, False, False, False)


def test_figures_are_whole(fields: dict[str, str]) -> None:
    run = bench_step(setting_of(fields), rounds=4, steps=2, command="gptoughts bench step")
    assert set(run["variants"]) == {OURS, PLAIN, AGAIN, FP32}
    for row in run["variants"].values():
        times = row["step_ms"]
        assert 0 < times["min"] <= times["q1"] <= times["median"] <= times["q3"] <= times["max"]
        assert row["tokens_per_second"] == pytest.approx(64 / times["median"] * 1000, rel=1e-3)
    assert set(run["ratios_of_tokens_per_second"]) == {"ours / plain", "ours again / ours", "ours / fp32 eager"}
    assert run["outside_verbs"]["steps"] == 500
    assert 0 < run["outside_verbs"]["seconds_per_step"] < 0.1
    assert run["losses"][OURS] == run["losses"][AGAIN] == pytest.approx(run["losses"][PLAIN], abs=1e-3)
    assert run["machine"]["threads"] == torch.get_num_threads()
    table = step_table(json.loads(json.dumps(run)))
    for word in ("ours / plain", "outside the verbs", "fp32 eager"):
        assert word in table


def test_clock_sees_the_verbs(fields: dict[str, str]) -> None:
    setting = setting_of(fields)
    subject = Subject(setting)
    with subject.engine(subject.recipe, setting.plan) as engine:
        clock = put_clock_on(engine)
        train(engine, Progress(), lambda now: now.step >= 2, subject.length.rate)
    assert clock.seconds > 0


def test_spread_and_pairs() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "min": 1.0, "max": 5.0, "q1": 2.0, "q3": 4.0}
    assert paired([2.0, 9.0, 2.0], [1.0, 3.0, 2.0])["median"] == 2.0


def test_a_file_keeps_other_runs_and_replaces_its_own(tmp_path: Path) -> None:
    path = tmp_path / "new" / "step.json"
    for run in ({"recipe": "a", "figure": 1}, {"recipe": "b", "figure": 2}, {"recipe": "a", "figure": 3}):
        keep(path, run, ("recipe",))
    assert json.loads(path.read_text())["runs"] == [{"recipe": "b", "figure": 2}, {"recipe": "a", "figure": 3}]


def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="not a file of measurements"):
        keep(path, {}, ("recipe",))
    assert path.read_text(encoding="utf-8") == "mine"


def test_what_a_bare_loop_cannot_do_is_said(fields: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="objective"):
        Subject(setting_of({**fields, "objective": "another"}))


def test_command_prints_the_table_and_keeps_the_figures(
    fields: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [word for key, value in fields.items() for word in (f"--{key}", value)]
    out = tmp_path / "step.json"
    with pytest.raises(SystemExit) as left:
        main(["bench", "step", *flags, "--layer.host", "system", "--rounds", "2", "--steps", "1", "--to", str(out)])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert "ours / plain" in printed and f"kept in {out}" in printed
    assert json.loads(out.read_text(encoding="utf-8"))["runs"][0]["recipe"] == "quickstart"


def test_data_measures_any_text_without_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gptoughts.cli.bench import data

    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {number} of a text that is measured\n" for number in range(4000)), encoding="utf-8")
    assert data(str(text), "bpe", str(tmp_path / "data.json")) == 0
    said = capsys.readouterr().out
    assert "mtok_per_second" in said
    assert "one_process_to_tiktoken" in said
    assert [run["what"] for run in json.loads((tmp_path / "data.json").read_text())["runs"]] == ["batches", "tokenize"]
