"""`python -m benchmarks.step`: both loops train alike, and the figures are complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.outside import put_clock_on
from benchmarks.plain import Settings, plain_loop, plain_settings
from benchmarks.step import AGAIN, FP32, OURS, PLAIN, Subject, bench_step, main
from benchmarks.table import step_table
from gptoughts.api import decide
from gptoughts.engine.callback import Callback
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

        class Losses(Callback):
            def on_step(self, engine: Any, progress: Any, stats: Any, last: bool) -> None:
                losses.append(float(stats.loss_sum / stats.weight))

        train(engine, Progress(), lambda now: now.step >= 4, subject.length.rate, callbacks=[Losses()])
    rate = subject.length.rate
    run = plain_loop(
        subject.recipe, subject.parts.family, subject.rows, batches=subject.batches(subject.recipe),
        device=torch.device("cpu"), settings=settings, rate=lambda step: rate(Progress(step=step)),
    )  # fmt: skip
    assert [run(1) for _ in range(4)] == pytest.approx(losses, abs=1e-5)


def test_settings_of_the_plain_loop_follow_the_plan(fields: dict[str, str]) -> None:
    setting = setting_of(fields, precision="bf16", attention="math", optimizer="plain", microbatch="fixed")
    subject = Subject(setting)
    with subject.engine(subject.recipe, setting.plan) as engine:
        assert plain_settings(setting.plan, engine) == Settings(4, torch.bfloat16, False, False, False)


def test_figures_are_whole(fields: dict[str, str]) -> None:
    run = bench_step(setting_of(fields), rounds=4, steps=2, command="typed")
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
    for word in ("ours / plain", "outside the engine", "fp32 eager"):
        assert word in table


def test_clock_sees_the_verbs(fields: dict[str, str]) -> None:
    setting = setting_of(fields)
    subject = Subject(setting)
    with subject.engine(subject.recipe, setting.plan) as engine:
        clock = put_clock_on(engine)
        train(engine, Progress(), lambda now: now.step >= 2, subject.length.rate)
    assert clock.seconds > 0


def test_what_a_bare_loop_cannot_do_is_said(fields: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"objective: benchmarks\.step trains next-token only"):
        Subject(setting_of({**fields, "objective": "another"}))


def test_command_prints_the_table_and_keeps_the_figures(
    fields: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [word for key, value in fields.items() for word in (f"--{key}", value)]
    out = tmp_path / "step.json"
    main([*flags, "--layer.host", "system", "--rounds", "2", "--steps", "1", "--to", str(out)])
    printed = capsys.readouterr().out
    assert "ours / plain" in printed and f"written: {out}" in printed
    assert json.loads(out.read_text(encoding="utf-8"))["runs"][0]["recipe"] == "quickstart"
