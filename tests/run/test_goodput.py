"""Goodput counts every second of a run once, over attempts that ended in any way, and its file cannot stop a training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoughts.engine.progress import Progress
from gptoughts.engine.trainer import train
from gptoughts.processes import process_began
from gptoughts.run import goodput
from gptoughts.run.goodput import FILE, PARTS, Goodput, Ledger, line
from tests.support.engines import engine_of, plan_of, recipe_of


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


phases = st.sampled_from(["step", "evaluation", "save", "sample", "log", "callback", "of a plugin"])


@given(
    st.floats(0, 50),
    st.integers(1, 4),
    st.lists(st.tuples(phases, st.floats(0, 10)), max_size=30),
    st.floats(0, 20),
)
def test_parts_add_up_to_the_time_since_the_start(
    since: float, warm: int, spent: list[tuple[str, float]], waited: float
) -> None:
    clock = Clock()
    ledger = Ledger(since, warm, clock)
    clock.now += 3
    for phase, seconds in spent:
        ledger.switch(phase)
        clock.now += seconds
    parts = ledger.parts(waited)
    assert list(parts) == list(PARTS)
    assert sum(parts.values()) == pytest.approx(since + 3 + sum(seconds for _, seconds in spent))
    assert min(parts.values()) >= -1e-9
    assert parts["start"] == pytest.approx(since + 3)
    assert ledger.parts(waited) == parts  # reading changes nothing


def test_the_first_steps_count_as_compilation_beyond_what_later_ones_take() -> None:
    clock = Clock()
    ledger = Ledger(5.0, 2, clock)
    for phase, seconds in [("step", 30), ("step", 10), ("step", 2), ("log", 1), ("step", 2), ("save", 4), ("step", 2)]:
        ledger.switch(phase)
        clock.now += seconds
    parts = ledger.parts(3.0)
    assert {part: value for part, value in parts.items() if value} == {
        "start": 5, "compile": 36, "productive": 7, "data": 3, "checkpoint": 4, "other": 1,
    }  # fmt: skip


def attempt(out: Path, began: float, resumed_from: int = 0) -> Goodput:
    return Goodput(out, 1, began, resumed_from, 0)


def shifted(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Both clocks of the module follow one hand."""
    clock = Clock()
    monkeypatch.setattr(goodput.time, "time", clock)
    monkeypatch.setattr(goodput.time, "monotonic", clock)
    monkeypatch.setattr(goodput.Ledger.__init__, "__defaults__", (clock,))
    return clock


def live(kept: Goodput, clock: Clock, *spent: tuple[str, float]) -> None:
    for phase, seconds in spent:
        kept._ledger.switch(phase)
        clock.now += seconds


def read(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / FILE).read_text())
    assert content["wall_seconds"] == pytest.approx(sum(content["parts"].values()))
    return content


def test_steps_after_the_checkpoint_of_a_killed_attempt_are_redone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = shifted(monkeypatch)
    first = attempt(tmp_path, clock.now)
    live(first, clock, ("step", 10), ("save", 1))
    first.checkpoint(4)
    live(first, clock, ("step", 10), ("save", 1))
    first.checkpoint(8)
    live(first, clock, ("step", 7))
    first.write("running")  # and killed later
    clock.now += 20
    second = attempt(tmp_path, clock.now, resumed_from=4)
    live(second, clock, ("step", 5))
    second.write("running")
    content = read(tmp_path)
    assert content["parts"]["redone"] == 17
    assert content["parts"]["productive"] == 10 + 5
    assert content["parts"]["restart"] == 20
    assert content["wall_seconds"] == clock.now - 100
    assert [(one["end"], one["first_step"]) for one in content["attempts"]] == [("killed", 0), ("running", 4)]
    assert list(content["checkpoints"]) == ["4"]  # that of step 8 belongs to steps that were redone
    clock.now += 2
    third = attempt(tmp_path, clock.now, resumed_from=4)
    assert third.parts()["redone"] == 17 + 5
    assert third.parts()["productive"] == 10


def test_without_a_checkpoint_everything_is_redone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = shifted(monkeypatch)
    first = attempt(tmp_path, clock.now)
    live(first, clock, ("step", 10))
    first.write("running")
    assert attempt(tmp_path, clock.now).parts()["redone"] == 10
    first.write("running")
    from_elsewhere = attempt(tmp_path, clock.now, resumed_from=123)  # a checkpoint of another run
    assert from_elsewhere.parts()["redone"] == 0 and from_elsewhere.parts()["productive"] == 10


def test_the_time_after_a_finished_run_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = shifted(monkeypatch)
    first = attempt(tmp_path, clock.now)
    live(first, clock, ("step", 10))
    first.checkpoint(10)
    first.waiting_for_disk()
    clock.now += 1
    first.close("finished")
    clock.now += 1000
    longer = attempt(tmp_path, clock.now, resumed_from=10)
    assert longer.parts()["restart"] == 0 and longer.parts()["checkpoint"] == 1 and longer.parts()["redone"] == 0


@pytest.mark.parametrize("content", ["", "{", '{"parts": {}}', "[]", '{"parts": 3, "attempts": [], "checkpoints": {}}', "null"])
def test_a_damaged_file_begins_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    kept = attempt(tmp_path, time.time())
    kept.write("running")
    assert len(read(tmp_path)["attempts"]) == 1


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).mkdir()
    kept = attempt(tmp_path, time.time())
    for _ in range(3):
        kept.write("running")
    assert caplog.text.count("cannot write it") == 1


def test_a_training_is_counted_by_its_own_phases(tmp_path: Path) -> None:
    recipe, heard = recipe_of("modern"), []
    with engine_of(recipe, plan_of(recipe)) as engine:
        engine.report = heard.append
        kept = Goodput(tmp_path, 1, time.time(), 0, 1)
        kept.on_start(engine, Progress())
        train(engine, Progress(), lambda now: now.step >= 6, lambda now: 1e-3, callbacks=[kept])
    said = kept.close("finished")
    content = read(tmp_path)
    assert heard.count("step") == 6  # the failure watch still hears every phase
    assert content["parts"]["productive"] > 0 and content["parts"]["compile"] >= 0
    assert content["attempts"][0]["end"] == "finished" and content["attempts"][0]["last_step"] == 6
    assert said.startswith("goodput     ") and " productive of " in said


def test_the_line_names_the_largest_part_first() -> None:
    parts = dict.fromkeys(PARTS, 0.0) | {"productive": 80.0, "start": 5.0, "checkpoint": 15.0}
    assert line(parts) == "goodput     80.0 % productive of 1 min 40 s: checkpoint 15.0 %, start 5.0 %"
    assert line(parts, 3).endswith("in 3 attempts: checkpoint 15.0 %, start 5.0 %")
    assert line(dict.fromkeys(PARTS, 0.0)) == "goodput     n/a"


def test_a_process_knows_when_it_began() -> None:
    before = time.time()
    code = "import time; time.sleep(0.5); from gptoughts.processes import process_began; print(process_began())"
    began = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert before - 0.05 <= began <= time.time() - 0.5 + 0.05
    assert process_began() <= time.time()


@pytest.mark.slow
def test_a_run_killed_and_resumed_twice_is_counted_whole(tmp_path: Path) -> None:
    """The parts of three attempts, two of which end by SIGKILL, are the wall time from the first start to the last exit."""
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 4000)
    words = (
        f"{sys.executable} -m gptoughts train shakespeare-char --data.path text.txt --data.cache cache --run-dir run --model.width 64 "
        "--model.heads 2 --model.depth 2 --data.sequence-length 64 --train.steps 900 --log.every 10 --eval.every 300 --eval.batches 2 "
        "--sample.tokens 4 --save.every 100"
    ).split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    content = tmp_path / "run" / FILE

    def reached() -> int:
        try:
            rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
            return max((json.loads(row)["step"] for row in rows if row.endswith("}")), default=0)
        except FileNotFoundError:
            return 0

    began, said, lost = time.time(), "", 0
    for target in (250, 650, None):
        with subprocess.Popen(
            words, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            while target is not None and reached() < target and process.poll() is None:
                time.sleep(0.005)
            if target is not None:
                process.send_signal(signal.SIGKILL)
            assert process.stdout is not None
            for line_of_run in process.stdout:
                said += line_of_run
                if line_of_run.startswith("goodput"):
                    wall = time.time() - began  # Python takes a second to unload torch after that
        assert process.returncode == (0 if target is None else -signal.SIGKILL), said[-3000:]
        if target is not None:
            time.sleep(5)
            written = json.loads(
                content.read_text()
            )  # at checkpoints and each second: fast steps after a checkpoint are not in it
            lost += max(0, written["attempts"][-1]["last_step"] - max(map(int, written["checkpoints"])))
    found = json.loads(content.read_text())
    assert sum(found["parts"].values()) == pytest.approx(wall, rel=0.01)
    assert found["wall_seconds"] == pytest.approx(wall, rel=0.01)
    assert [one["end"] for one in found["attempts"]] == ["killed", "killed", "finished"]
    assert found["parts"]["restart"] >= 10
    assert (found["parts"]["redone"] > 0) is (lost > 0)
    assert all(found["parts"][part] > 0 for part in ("start", "productive", "evaluation", "checkpoint", "sample"))
    assert "in 3 attempts" in said
