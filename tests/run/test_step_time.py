"""The parts of a timed step are what happened in them, they add up to the step, and nothing of the timer stays behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoughts.engine.engine import Engine
from gptoughts.engine.progress import BACKWARD, COMMUNICATION, DATA_WAIT, END, FORWARD, OPTIMIZER, OTHER, PARTS, Progress
from gptoughts.engine.trainer import run_step, train
from gptoughts.run.step_time import NO_SPLIT, Sample, Split, StepTimer
from tests.run.test_callbacks import log_to
from tests.support.engines import engine_of, plan_of, recipe_of, steps

PAUSE = 0.15


def one_split(engine: Engine) -> Split:
    timer = StepTimer(engine)
    engine.model.train()
    timer.start()
    run_step(engine, Progress(), lambda _: 1e-3)
    sample = timer.stop()
    assert sample is not None
    return sample.split()


def slow(function: Callable[..., Any]) -> Callable[..., Any]:
    def slowed(*arguments: Any) -> Any:
        time.sleep(PAUSE)
        return function(*arguments)

    return slowed


@pytest.mark.parametrize("part", [DATA_WAIT, FORWARD, BACKWARD, OPTIMIZER])
def test_time_is_counted_to_the_part_in_which_it_passes(part: str) -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, {"microbatch": "fixed", "microbatch.sequences": 2})) as engine:
        steps(engine, 1)
        before = one_split(engine)
        if part == DATA_WAIT:
            batches = engine.batches
            engine.batches = iter(map(slow(lambda item: item), batches))
        elif part == FORWARD:
            handle = engine.model.register_forward_pre_hook(lambda *_: time.sleep(PAUSE / 2))  # two micro-batches
        elif part == BACKWARD:
            engine.wrap("backward", lambda inner, loss: (time.sleep(PAUSE / 2), inner(loss))[1])
        else:
            engine.wrap("clip", lambda inner: slow(inner)())
        after = one_split(engine)
        if part == FORWARD:
            handle.remove()
    assert list(before.seconds) == list(PARTS)
    assert after.seconds[part] >= PAUSE
    assert after.busy == pytest.approx(after.total)  # one process waits for nobody
    assert after.seconds[COMMUNICATION] == 0
    assert after.host_bound is None
    assert after.cpu_seconds is not None and 0 < after.cpu_seconds < after.total - 0.9 * PAUSE  # which passed asleep
    assert after.row()["time/communication"] == 0


def test_the_parts_are_the_whole_step() -> None:
    recipe = recipe_of("gpt2")
    with engine_of(recipe, plan_of(recipe)) as engine:
        steps(engine, 1)
        timer = StepTimer(engine)
        timer.start()
        began = time.perf_counter()
        run_step(engine, Progress(), lambda _: 1e-3)
        outside = time.perf_counter() - began
        sample = timer.stop()
    assert sample is not None and sample.has_passed
    marks = [part for part, _, _ in sample.marks]
    assert marks == [DATA_WAIT, OTHER, OTHER, OTHER, FORWARD, BACKWARD, OTHER, OTHER, OPTIMIZER, END]
    assert sample.split().total == pytest.approx(sample.marks[-1][1] - sample.marks[0][1])
    assert sample.split().total <= outside


def test_a_timer_leaves_no_hook_and_changes_no_number() -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe)) as engine:
        losses = steps(engine, 4)
    with engine_of(recipe, plan_of(recipe)) as engine:
        mark, timer = engine.mark, StepTimer(engine)
        timer.start()
        timed = steps(engine, 4)
        assert timer.stop() is not None
        assert engine.mark is mark
        assert timer.stop() is None
        assert all(not (parameter._post_accumulate_grad_hooks or {}) for parameter in engine.parameters())
    assert timed == losses


def test_a_step_that_did_not_end_is_no_sample() -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe), iter([])) as engine:
        timer = StepTimer(engine)
        timer.start()
        with pytest.raises(StopIteration):
            run_step(engine, Progress(), lambda _: 1e-3)
        assert timer.stop() is None


def test_marks_count_from_the_last_beginning_of_a_step_that_is_repeated() -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe)) as engine:
        timer = StepTimer(engine)
        timer.start()
        steps(engine, 3)
        sample = timer.stop()
    assert sample is not None and [part for part, _, _ in sample.marks].count(END) == 1


def test_rows_have_the_split_of_their_step() -> None:
    recipe, rows = recipe_of("modern"), []
    with engine_of(recipe, plan_of(recipe)) as engine:
        log = log_to(rows)
        log.on_start(engine, Progress())
        reached = train(engine, Progress(), lambda now: now.step >= 5, lambda now: 1e-3, callbacks=[log])
        log.on_end(engine, reached)
    assert [row["step"] for row in rows] == [1, 2, 4, 5]
    for row in rows[:3]:
        assert all(row[f"time/{part}"] >= 0 for part in PARTS) and row["time/backward"] > 0
    assert {key: rows[3][key] for key in NO_SPLIT} == NO_SPLIT  # that step 5 would be the last was not known before it
    assert rows[0]["perf/steady_tokens_per_second"] is None and rows[-1]["perf/steady_tokens_per_second"] > 0
    assert "perf/slowest_rank" not in rows[0]


# The device's timeline, played by numbers: two clocks that differ.

times = st.floats(0, 1, allow_nan=False)


@given(
    st.lists(
        st.tuples(st.sampled_from([DATA_WAIT, FORWARD, BACKWARD, OPTIMIZER, COMMUNICATION, OTHER]), times, times), max_size=12
    )
)
def test_parts_of_any_step_add_up(intervals: list[tuple[str, float, float]]) -> None:
    sample = Sample(lambda began, ended: ended - began, True)
    device = host = 0.0
    for part, on_device, on_host in intervals:
        sample.marks.append((part, device, host))
        device, host = device + on_device, host + on_host
    sample.marks.append((END, device, host))
    sample.caught_up = [True] * len(intervals)
    split = sample.split()
    assert split.total == pytest.approx(device)
    assert split.host_bound is None or 0 <= split.host_bound <= 1 + 1e-9


def test_a_gpu_that_waits_for_its_host_is_told_from_one_that_does_not() -> None:
    def split(caught_up: list[bool], launching: float) -> Split:
        sample = Sample(lambda began, ended: ended - began, True)
        sample.marks = [(FORWARD, 0.0, 0.0), (BACKWARD, 1.0, launching), (END, 3.0, 3 * launching)]
        sample.caught_up = caught_up
        return sample.split()

    assert split([True, True], 1.0).host_bound == 1  # an empty queue, and launching takes as long as the work
    assert split([True, True], 0.2).host_bound == 0  # the host is ahead within the part
    assert split([False, False], 1.0).host_bound == 0  # the queue was never empty
    assert split([False, True], 1.0).host_bound == pytest.approx(2 / 3)


def test_exchange_after_the_last_gradient_is_communication() -> None:
    sample = Sample(lambda began, ended: ended - began, True)
    sample.marks = [
        (COMMUNICATION, 0.0, 0.0), (FORWARD, 1.0, 0.0), (BACKWARD, 2.0, 0.0), (FORWARD, 4.0, 0.0), (BACKWARD, 5.0, 0.0), (OTHER, 9.0, 0.0), (END, 9.5, 0.0),
    ]  # fmt: skip
    sample.gradients = [6.0]
    assert sample.split().seconds == {
        "data_wait": 0, "forward": 2, "backward": 3, "optimizer": 0, "communication": 4, "other": 0.5,
    }  # fmt: skip
    assert sample.split().busy == 5.5
    hidden = Sample(lambda began, ended: ended - began, False, sample.marks)
    assert hidden.split().busy is None and hidden.split().row()["time/communication"] is None
    assert hidden.split().total == 9.5
