"""The loss scaler: what a scale does to a gradient, which steps it leaves out, what survives a restart, and how a hopeless run ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoughts.config.model_spec import spec_for
from gptoughts.engine.checkpoint import state as training_state
from gptoughts.engine.checkpoint import store as checkpoint
from gptoughts.engine.trainer import Progress, run_step
from gptoughts.errors import PlanError, RunError
from gptoughts.hardware.machine import read
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.layers.precision_fp16 import LEAST_SCALE, SKIPPED, LossScale
from gptoughts.planning.layer import Case, Kind, Status
from gptoughts.planning.profile import pick
from gptoughts.planning.resolve import resolve
from tests.engine.test_ddp import launch
from tests.layers.test_contract import gradient
from tests.support.engines import engine_of, plan_of, recipe_of, steps, watched

LAYER = CATALOG["fp16"]
OPTIONS = LAYER.read_options({}, "the test")
FP16 = {"precision": "fp16"}


def poisoned(engine: Any, when: set[int]) -> None:
    """Make the gradients of some steps infinite, as an overflow in float16 does; steps are counted from 0."""
    seen = {"step": -1}

    def overflow(inner: Any, loss: torch.Tensor) -> None:
        inner(loss)
        if seen["step"] in when:
            engine.parameters()[0].grad[0, 0] = float("inf")

    def count() -> tuple[Any, Any]:
        seen["step"] += 1
        return before()

    engine.wrap("backward", overflow)
    before, engine.next_batch = engine.next_batch, count


def weights(engine: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in engine.parameters()])


@pytest.mark.parametrize("family", ["modern", "llama"])
def test_the_gradient_is_the_baselines_whatever_the_scale(family: str) -> None:
    recipe = recipe_of(family)
    loss, flat = gradient(recipe, {})
    for scale in (2.0**4, 2.0**16):
        other, its = gradient(recipe, {**FP16, "precision.scale": scale})
        assert abs(loss - other) < 1e-3 * loss
        assert torch.nn.functional.cosine_similarity(flat, its, dim=0) > 0.9999
        assert float(its.norm() / flat.norm()) == pytest.approx(1, rel=1e-2)


def test_a_step_that_overflows_is_left_out_and_counted() -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, FP16)) as engine:
        poisoned(engine, {1, 2})
        scaler, progress, updated, norms, moved = engine.extras["fp16"], Progress(), [], [], []
        for _ in range(4):
            before = weights(engine)
            progress, stats = run_step(engine, progress, lambda _: 1e-3)
            updated.append(stats.updated)
            norms.append(float(stats.grad_norm))
            moved.append(not torch.equal(before, weights(engine)))
        assert updated == moved == [True, False, False, True]
        assert norms[1:3] == [0.0, 0.0]
        assert norms[0] > 0 < norms[3]
        assert progress.step == engine.counters.updates == 2
        assert engine.counters.call_counts[SKIPPED] == scaler.skipped == 2
        assert scaler.scale == OPTIONS["scale"] / 4
        assert all(parameter.grad is None for parameter in engine.parameters())
        proof = LAYER.verify(engine, watched(engine, warm=0), OPTIONS)
    assert proof.status is Status.ACTIVE
    assert "2 steps skipped so far" in proof.text


def test_a_watched_step_that_moved_no_weight_is_inactive() -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, FP16)) as engine:
        poisoned(engine, {0})
        trace = watched(engine, warm=0)
        assert not trace.updated
        assert LAYER.verify(engine, trace, OPTIONS).status is Status.INACTIVE


def test_overflows_without_end_stop_the_run() -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, {**FP16, "precision.scale": 4.0})) as engine:
        poisoned(engine, set(range(10)))
        with pytest.raises(RunError, match=r"3 consecutive steps with non-finite gradients.*\n  Try: .*--layer.precision fp32"):
            steps(engine, 10)


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 20), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_the_scale_halves_and_doubles_as_gradscaler_does(finite: list[bool], exponent: int, interval: int) -> None:
    """Against torch's own, fed the same findings."""
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**exponent, growth_interval=interval)
    theirs.scale(torch.ones(()))

    class Held:
        optimizer = None
        counters = type("Counters", (), {"call_counts": {SKIPPED: 0}})()

    mine = LossScale(Held(), 2.0**exponent, interval)
    for good in finite:
        mine.finite = torch.tensor(good)
        found = torch.tensor(0.0 if good else 1.0)
        torch._amp_update_scale_(theirs._scale, theirs._growth_tracker, found, 2.0, 0.5, interval)
        try:
            assert mine.step(lambda: True) is good
        except RunError:
            assert theirs.get_scale() < LEAST_SCALE
            return
        assert mine.scale == min(theirs.get_scale(), 2.0**24)
        if mine.scale == 2.0**24:
            return


def test_scale_and_count_survive_a_checkpoint(tmp_path: Path) -> None:
    recipe, plan = recipe_of("modern"), plan_of(recipe_of("modern"), {**FP16, "precision.growth_interval": 3})
    with engine_of(recipe, plan) as engine:
        poisoned(engine, {0})
        steps(engine, 5)
        state = engine.extras["fp16"].state_dict()
        folder = checkpoint.write(training_state.snapshot(engine, 4, {}, {"plan.json": "{}"}, {}), tmp_path)
    assert state == {"scale": 2.0**16, "good_in_a_row": 1, "bad_in_a_row": 0, "skipped": 1}
    with engine_of(recipe, plan) as engine:
        training_state.restore(engine, folder)
        assert engine.extras["fp16"].state_dict() == state
        steps(engine, 1)


def test_accumulated_micro_batches_share_one_scale() -> None:
    recipe = recipe_of("modern")
    loss, whole = gradient(recipe, FP16)
    other, accumulated = gradient(recipe, {**FP16, "microbatch": "fixed", "microbatch.sequences": 1})
    assert abs(loss - other) < 1e-3 * loss
    assert torch.nn.functional.cosine_similarity(whole, accumulated, dim=0) > 0.9999
    assert float(accumulated.norm() / whole.norm()) == pytest.approx(1, rel=1e-2)


def test_evaluation_is_in_float16_too() -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, FP16)) as engine, torch.no_grad(), engine.eval_context():
        assert engine.bare(torch.zeros(1, 8, dtype=torch.long)).dtype is torch.float16


@pytest.mark.slow
def test_ranks_leave_the_same_step_out(tmp_path: Path) -> None:
    """One rank's gradient overflows; it is in every rank's mean, so all skip without a word to each other."""
    ran = launch(2, "-m", "tests.support.fp16_worker", str(tmp_path / "rank"))
    assert ran.returncode == 0, ran.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    assert first == second
    assert first["updated"] == [True, False, True]
    assert first["scale"] == OPTIONS["scale"] / 2


@pytest.mark.parametrize(
    ("machine", "given_options", "kind", "words"),
    [
        ("t4", {}, None, ""),
        ("h100", {}, None, ""),
        ("cpu", {}, Kind.SLOWER, "float16 matmuls ran at 1 to 33 GFLOP/s on CPUs"),
        ("t4", {"scale": 1000.0}, Kind.UNSUPPORTED, "scale must be a power of two from 1 to 2^24, found 1000"),
        ("t4", {"scale": 0.5}, Kind.UNSUPPORTED, "scale must be a power of two"),
    ],
)
def test_it_says_why_it_does_not_fit(machine: str, given_options: dict[str, Any], kind: Kind | None, words: str) -> None:
    recipe = recipe_of("modern")
    case = Case(read(f"tests/machines/{machine}.json"), spec_for(recipe), recipe, World())
    reasons = LAYER.rejections(case, LAYER.read_options(given_options, "the test"))
    assert any(one.kind is kind and words in str(one) for one in reasons) if kind else not reasons, reasons


def test_an_older_gpu_has_no_tensor_cores() -> None:
    machine = read("tests/machines/t4.json")
    pascal = replace(machine, gpus=tuple(replace(gpu, compute_capability=(6, 1)) for gpu in machine.gpus))
    recipe = recipe_of("modern")
    reasons = LAYER.rejections(Case(pascal, spec_for(recipe), recipe, World()), OPTIONS)
    assert "needs compute capability 7.0, found 6.1" in str(reasons[0])


def test_a_t4_trains_in_float16_with_a_scaler() -> None:
    machine, recipe = read("tests/machines/t4.json"), recipe_of("modern")
    plan = resolve(pick("auto", machine), machine, spec_for(recipe), recipe, World(), CATALOG)
    assert plan.layers["precision"] == "fp16"
    with pytest.raises(PlanError, match="in-backward"):
        resolve(
            pick("auto", machine), machine, spec_for(recipe), recipe, World(), CATALOG, flags={**FP16, "update": "in-backward"}
        )
