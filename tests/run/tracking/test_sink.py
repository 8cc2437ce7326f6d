"""Sinks behind a queue: slow, hanging and failing ones never stop or delay the caller."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from gptoughts.console import Console
from gptoughts.run.tracking import sink as sinks
from gptoughts.run.tracking.jsonl import Jsonl, newest_sample, read, replay, rows
from gptoughts.run.tracking.loss_plot import LossPlot
from gptoughts.run.tracking.sink import QueuedSink, RunInfo, Sink, Sinks, make_sinks


class Kept(Sink):
    """Keeps its calls; waits before the first row until `gate` is set."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.calls: list[Any] = []
        self.gate = gate

    def start(self, run: RunInfo) -> None:
        self.calls.append(("start", threading.current_thread() is threading.main_thread()))

    def log(self, step: int, values: Any) -> None:
        if self.gate:
            self.gate.wait(20)
        self.calls.append(("log", step))

    def sample(self, index: int, values: Any) -> None:
        self.calls.append(("sample", index))

    def text(self, step: int, name: str, text: str) -> None:
        self.calls.append(("text", step, name, text))

    def artifact(self, path: Path) -> None:
        self.calls.append(("artifact", path.name))

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def said() -> Iterator[StringIO]:
    text = StringIO()
    with Console(text).logging():
        yield text


RUN = RunInfo("run", Path())


def test_a_queued_sink_gets_every_call_in_order_on_its_own_thread() -> None:
    kept = Kept()
    queued = QueuedSink(kept)
    queued.start(RUN)
    queued.log(1, {})
    queued.sample(1, {})
    queued.text(1, "sample", "once")
    queued.artifact(Path("loss.png"))
    queued.close()
    assert kept.calls == [
        ("start", False),
        ("log", 1),
        ("sample", 1),
        ("text", 1, "sample", "once"),
        ("artifact", "loss.png"),
        "close",
    ]


def test_rows_that_a_slow_sink_has_no_room_for_are_dropped_and_counted(said: StringIO) -> None:
    gate = threading.Event()
    kept = Kept(gate)
    queued = QueuedSink(kept, rows=3)
    queued.start(RUN)
    queued.log(0, {})
    while len(kept.calls) < 1 or queued._calls.qsize():  # until row 0 waits at the gate
        time.sleep(0.01)
    for step in range(1, 11):
        queued.log(step, {})
    gate.set()
    queued.close()
    assert [call[1] for call in kept.calls if call[0] == "log"] == [0, 1, 2, 3] and kept.calls[-1] == "close"
    assert said.getvalue().splitlines() == [
        "warning: tracker Kept is slow: its queue of 3 rows is full",
        "warning: tracker Kept was too slow; rows dropped: 7 (metrics.jsonl has all)",
    ]


def test_sinks_that_hang_are_left_behind_together(said: StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.3)
    gate, kept = threading.Event(), Kept()
    both = Sinks([QueuedSink(Kept(gate), rows=2), QueuedSink(Kept(gate), rows=2), QueuedSink(kept)])
    both.start(RUN)
    began = time.monotonic()
    for step in range(10):
        both.log(step, {})
    both.close()
    assert time.monotonic() - began < 5
    gate.set()
    assert said.getvalue().count("does not answer and was left behind") == 2
    assert kept.calls[-1] in ("close", ("log", 9)), "a sink behind the others still gets its rows"


def test_a_failing_sink_is_reported_once_by_its_thread_and_is_off(said: StringIO) -> None:
    class Broken(Kept):
        def log(self, step: int, values: Any) -> None:
            super().log(step, values)
            raise OSError(28, "No space left on device")

    broken, rows = Broken(), Kept()
    both = Sinks([QueuedSink(broken), rows])
    both.start(RUN)
    for step in (1, 2, 3):
        both.log(step, {})
    both.close()
    assert broken.calls == [("start", False), ("log", 1), "close"]
    assert [call for call in rows.calls if call[0] == "log"] == [("log", 1), ("log", 2), ("log", 3)]
    assert said.getvalue() == (
        "warning: tracker Broken failed and is off for the rest of the run: OSError: [Errno 28] No space left on device\n"
    )


def test_a_folder_that_cannot_be_written_is_named_once(said: StringIO, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file in place of the folder")
    both = Sinks(make_sinks(["tensorboard"]))
    both.start(RunInfo("run", tmp_path))
    for step in (1, 2, 3):
        both.log(step, {"train/loss": 1.0})
    both.close()
    assert len(rows(tmp_path / "metrics.jsonl")) == 3
    lines = said.getvalue().splitlines()
    assert len(lines) == 1 and "tracker TensorBoard failed" in lines[0] and str(tmp_path / "tensorboard") in lines[0]


def test_jsonl_is_always_the_first_and_alone_without_a_queue() -> None:
    made = make_sinks(["plot", "plot"])
    assert [type(sink) for sink in made] == [Jsonl, QueuedSink]
    assert isinstance(made[1], QueuedSink) and isinstance(made[1]._sink, LossPlot)


def test_a_replay_gives_each_step_and_sample_once(tmp_path: Path) -> None:
    """Attempt 1 reached step 5 and its checkpoint is of step 3; attempt 2 wrote step 4 before the replay ran."""
    for attempt, steps, start in ((1, range(1, 6), 0), (2, range(4, 5), 3)):
        jsonl = Jsonl()
        jsonl.start(RunInfo("run", tmp_path, attempt, step=start))
        for step in steps:
            jsonl.log(step, {"train/loss": step + attempt / 10})
            jsonl.sample(10 * attempt + step, {"step": step})
            jsonl.text(step, "sample", f"text {step}")
        jsonl.close()
    with (tmp_path / "system.jsonl").open("a") as file:
        file.write('{"sample": 99, "att')
    kept = Kept()
    replay(RunInfo("run", tmp_path, 2, step=3), kept)
    assert kept.calls == [
        *(("log", step) for step in (1, 2, 3)),
        *(("sample", number) for number in range(11, 16)),
        *(("text", step, "sample", f"text {step}") for step in (1, 2, 3)),
    ]
    assert newest_sample(tmp_path / "system.jsonl") == 24 and newest_sample(tmp_path / "none") == 0
    assert [row["train/loss"] for row in read(tmp_path / "metrics.jsonl")] == [1.1, 2.1, 3.1, 4.2]
    third = Jsonl()
    third.start(RunInfo("run", tmp_path, 3))
    third.sample(25, {"step": 4})
    third.close()
    assert newest_sample(tmp_path / "system.jsonl") == 25, "a torn line does not swallow the next"


def test_the_plot_is_drawn_at_a_validation_and_not_more_than_it_is_worth(tmp_path: Path) -> None:
    jsonl, plot, picture = Jsonl(), LossPlot(), tmp_path / "loss.png"
    for sink in (jsonl, plot):
        sink.start(RunInfo("run", tmp_path))
    jsonl.log(1, {"train/loss": 3.0, "train/num_tokens": 10})
    plot.log(1, {"train/loss": 3.0})
    assert not picture.exists()
    plot.log(1, {"eval/loss": 3.0})
    assert picture.exists()
    picture.unlink()
    plot.log(1, {"eval/loss": 3.0})
    assert not picture.exists(), "drawing took its share of the time"
    plot.close()
    assert picture.exists()
