"""What is logged is what happened; a loss that is not finite is not logged as one, and poisons no checkpoint."""

from __future__ import annotations

import logging
import math
import re
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoughts.console import Console, SilentConsole, count, duration, note, share
from gptoughts.engine.callback import Callback
from gptoughts.engine.checkpoint.store import Snapshot
from gptoughts.engine.checkpoint.writer import Writer
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.objectives.base import Objective
from gptoughts.engine.run_length import RunLength
from gptoughts.engine.trainer import Progress, StepStats, train
from gptoughts.errors import ConfigError, DataError, RunError
from gptoughts.hardware.world import World
from gptoughts.inference.eval.perplexity import mean_loss
from gptoughts.run.callbacks import Evaluate
from gptoughts.run.log import Log, every
from gptoughts.run.saving import Save
from gptoughts.run.throughput import Throughput
from gptoughts.run.tracking.jsonl import Jsonl, attempts, read
from gptoughts.run.tracking.sink import SINKS, CallbackSink, RunInfo, Sink, Sinks, check_sinks
from tests.support.engines import engine_of, plan_of, random_batches, recipe_of


class Rows(Sink):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def log(self, step: int, values: Any) -> None:
        self.rows.append({"step": step, **values})


def log_to(rows: list[dict[str, Any]], length: RunLength | None = None, console: Console | None = None) -> Log:
    figures = Throughput(2, 10**9, lambda speed: speed / 100)
    return Log(2, Rows(rows), console or SilentConsole(), figures, length)


def test_rows_are_written_at_the_first_each_period_and_the_last() -> None:
    recipe, rows = recipe_of("modern"), []
    with engine_of(recipe, plan_of(recipe)) as engine:
        log = log_to(rows)
        log.on_start(engine, Progress())
        progress = train(engine, Progress(), lambda now: now.step >= 5, lambda now: 1e-3, callbacks=[log])
    assert [row["step"] for row in rows] == [1, 2, 4, 5]
    assert rows[-1]["train/num_tokens"] == progress.tokens == 5 * 4 * 32
    assert rows[-1]["perf/tokens_per_second_per_gpu"] == rows[-1]["perf/tokens_per_second"] / 2
    assert rows[-1]["perf/tflops_per_gpu"] == pytest.approx(rows[-1]["perf/tokens_per_second"] / 2 * 1e9 / 1e12)
    assert rows[-1]["perf/mfu"] == pytest.approx(rows[-1]["perf/tokens_per_second"] / 100)
    assert all(0 <= row["perf/data_wait"] <= 1 for row in rows)


def test_a_bad_step_is_logged_without_a_loss_and_never_as_zero() -> None:
    recipe, rows = recipe_of("modern"), []
    batch, number = next(random_batches(recipe))
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    text = StringIO()
    with engine_of(recipe, plan_of(recipe), iter([(batch, number), *islice(random_batches(recipe), 3)])) as engine:
        log = log_to(rows, console=Console(text))
        log.on_start(engine, Progress())
        progress = train(engine, Progress(), lambda now: now.step >= 1, lambda now: 1e-3, callbacks=[log])
        with torch.no_grad():
            engine.bare.blocks[0].mlp.down.weight.fill_(math.inf)
        train(engine, progress, lambda now: now.step >= 2, lambda now: 1e-3, callbacks=[log])
    assert [(row["train/loss"], row["train/grad_norm"]) for row in rows] == [(None, 0.0), (None, None)]
    assert text.getvalue().count("loss n/a") == 2


def test_no_checkpoint_is_written_of_weights_that_are_not_finite(tmp_path: Path) -> None:
    recipe = recipe_of("modern")

    def take(engine: Any, progress: Progress) -> Snapshot:
        raise AssertionError("a poisoned state was taken")

    save = Save(1, Writer(tmp_path, 1, False), take)
    stats = StepStats(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(math.nan), True, 1, 1, 1e-3)
    with engine_of(recipe, plan_of(recipe)) as engine, pytest.raises(RunError, match="no checkpoint is written"):
        save.on_step(engine, Progress(step=3), stats, last=False)
    assert not list(tmp_path.iterdir())


def test_validation_is_the_sum_over_labels_and_leaves_the_model_training() -> None:
    recipe, _rows = recipe_of("modern"), []
    batches = [next(random_batches(recipe, ragged=True, seed=seed))[0] for seed in range(3)]
    with engine_of(recipe, plan_of(recipe)) as engine:
        engine.model.train()
        loss, labels = mean_loss(engine, batches)
        assert engine.bare.training
        total = sum(float(engine.objective(engine.bare, batch).detach()) for batch in batches)
        weight = sum(float(engine.objective.weight(batch)) for batch in batches)
        assert loss == pytest.approx(total / weight, rel=1e-6)
        assert labels == weight
        text = StringIO()
        evaluate = Evaluate(0, lambda: batches, Sink(), Console(text))
        evaluate.on_step(engine, Progress(step=7), None, last=True)  # type: ignore[arg-type]
        assert evaluate.result == (7, pytest.approx(loss))
        assert f"step 7  validation loss {loss:.4f}" in text.getvalue()
        empty = [{"input_ids": batches[0]["input_ids"], "labels": torch.full_like(batches[0]["input_ids"], -100)}]
        with pytest.raises(DataError, match="validation split: no labels"):
            mean_loss(engine, empty)


def test_periods() -> None:
    assert [step for step in range(1, 9) if every(3, step, False)] == [3, 6]
    assert not every(0, 4, False)
    assert every(0, 4, True)


def started(out: Path, attempt: int) -> Jsonl:
    sink = Jsonl()
    sink.start(RunInfo("run", out, attempt))
    return sink


def test_keys_of_earlier_versions_are_read_under_their_present_names(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "attempt": 1, "eval/loss": 2.0, "train/num_tokens": 64}\n')
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "attempt": 1, "eval/loss": 2.0, "train/num_tokens": 64}]


def test_rows_of_several_attempts_are_read_as_the_last_one_says(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = started(tmp_path, 1)
    for step in (1, 2, 3, 4):
        first.log(step, {"train/loss": float(step)})
    first.close()
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "attempt": 1, "train/lo')  # torn by a kill
    assert attempts(path) == 1
    second = started(tmp_path, 2)
    for step in (3, 4):
        second.log(step, {"train/loss": 10.0 * step})
    second.close()
    assert attempts(path) == 2
    assert [(row["step"], row["train/loss"]) for row in read(path)] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


FIELDS = ("step 40/40", "loss 5.8393", "1584 tok/s", "MFU n/a", "ETA 2 min 11 s", "data wait 0.0 %", "of GEMM 12.3 %")


@pytest.mark.parametrize("columns", [30, 80, 200])
def test_a_terminal_gets_one_live_row_that_never_wraps_and_a_log_gets_lines(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    live, plain = Terminal(), StringIO()
    for stream in (live, plain):
        console = Console(stream)
        console.row(*FIELDS)
        console.row(*FIELDS)
        console.say("saved")
        console.end_row()
    row = "  ".join(FIELDS)
    assert plain.getvalue() == f"{row}\n{row}\nsaved\n"
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rpartition("\r")[2] for line in live.getvalue().split("\n")]
    assert "saved" in lines and max(map(len, lines)) < columns
    assert any(line.startswith("step 40/40  loss") for line in lines)
    assert any("of GEMM" in line for line in lines) == (columns > len(row))


def test_records_of_the_logger_are_printed_by_a_running_console_only() -> None:
    text = StringIO()
    with Console(text).logging():
        note("recompiled")
        logging.getLogger("gptoughts").warning("tracker failed")
    note("later")
    assert text.getvalue() == "note: recompiled\nwarning: tracker failed\n"


def test_the_innermost_console_gets_the_records_alone() -> None:
    outer, inner = StringIO(), StringIO()
    with Console(outer).logging():
        with Console(inner).logging():
            note("inside")
        with SilentConsole().logging():
            logging.getLogger("gptoughts").warning("silenced")
        note("outside")
    assert (inner.getvalue(), outer.getvalue()) == ("note: inside\n", "note: outside\n")


def test_a_sink_that_fails_is_reported_once_and_left_out() -> None:
    class Broken(Sink):
        def log(self, step: int, values: Any) -> None:
            raise OSError(28, "No space left on device")

    rows: list[dict[str, Any]] = []
    text, sinks = StringIO(), Sinks([Broken(), Rows(rows)])
    with Console(text).logging():
        for step in (1, 2, 3):
            sinks.log(step, {"train/loss": 1.0})
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert text.getvalue().count("\n") == 1 and "tracker Broken failed" in text.getvalue()


def test_an_error_in_a_users_callback_is_raised() -> None:
    class Wrong(Callback):
        def on_log(self, step: int, values: Any) -> None:
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        Sinks([CallbackSink(Wrong())]).log(1, {"train/loss": 1.0})


def test_unknown_trackers_are_refused_with_the_nearest_name() -> None:
    check_sinks(SINKS)
    with pytest.raises(ConfigError, match=r"track: no tracker named 'jsnl' \(did you mean 'jsonl'\?\)"):
        check_sinks(["jsnl"])


def test_the_eta_leaves_out_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds of compilation in step 1, then a second a step: after step 3 of 6 three seconds are left, not twelve."""
    recipe = recipe_of("modern", train={"steps": 6})
    length = RunLength(recipe, Ranks(World(), torch.device("cpu")), 4)
    text, rows = StringIO(), []
    with engine_of(recipe, plan_of(recipe)) as engine:
        log = log_to(rows, length, Console(text))
        log.period = 1
        log.on_start(engine, Progress())
        stats = StepStats(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.0), True, 1, 1, 1e-3)
        for step, seconds in ((1, 10.0), (2, 11.0), (3, 12.0)):
            log.on_step(engine, Progress(step, 128 * step, seconds), stats, False)
    first, second, third = text.getvalue().splitlines()
    assert "ETA" not in first and "ETA 4 s" in second and "ETA 3 s" in third
    assert [row["train/epoch"] for row in rows] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (duration(7.2), "7 s"),
        (duration(200), "3 min 20 s"),
        (duration(7500), "2 h 05 min"),
        (count(950), "950"),
        (count(12300), "12.3 k"),
        (count(4.56e6), "4.56 M"),
        (count(1.2e9), "1.2 B"),
        (share(None), "n/a"),
        (share(0.1234), "12.3 %"),
    ],
)
def test_words_for_figures(made: str, expected: str) -> None:
    assert made == expected


def test_a_weight_below_one_scales_the_gradient_as_it_scales_the_loss() -> None:
    """An objective whose sum and weight shrink alike is the same objective."""

    class Scaled(Objective):
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def __call__(self, model: Any, batch: Any) -> torch.Tensor:
            return model(batch["input_ids"][:, :-1], labels=batch["input_ids"][:, 1:]) * self.factor

        def weight(self, batch: Any) -> float:
            return self.tokens(batch) * self.factor

        def tokens(self, batch: Any) -> int:
            return batch["input_ids"][:, 1:].numel()

    recipe, norms = recipe_of("modern"), []
    for factor in (1.0, 1e-4):
        with engine_of(recipe, plan_of(recipe)) as engine:
            engine.objective = Scaled(factor)
            rows: list[dict[str, Any]] = []
            log = log_to(rows)
            log.on_start(engine, Progress())
            train(engine, Progress(), lambda now: now.step >= 1, lambda now: 1e-3, callbacks=[log])
            norms.append((rows[0]["train/loss"], rows[0]["train/grad_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
