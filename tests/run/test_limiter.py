"""Every verdict follows from the figures that cause it, and every flag that is proposed is one that the command line accepts."""

from __future__ import annotations

import gc
import json
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptoughts.api import decide
from gptoughts.config.model_spec import spec_for
from gptoughts.console import Console
from gptoughts.engine.progress import PARTS
from gptoughts.hardware.machine import probe
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.planning.evidence import Operator, StepTrace
from gptoughts.run import limiter
from gptoughts.run.advice import CANDIDATES, FLAG, LARGER, Advisor
from gptoughts.run.goodput import PARTS as SPENT
from gptoughts.run.limiter import (
    BANDWIDTH,
    COMPUTE,
    DATA,
    DEVICE,
    EXCHANGE,
    HOST,
    LIMITERS,
    SAVING,
    STRAGGLER,
    THROTTLING,
    Limiter,
    Pauses,
    Verdict,
    Window,
    gpu_fields,
    judge,
    operator_seconds,
)
from tests.support.engines import plan_of, recipe_of
from tests.support.golden_files import ROOT

EVEN = {"data_wait": 0.0, "forward": 0.3, "backward": 0.6, "optimizer": 0.05, "communication": 0.0, "other": 0.05}


def row(**changed: Any) -> dict[str, Any]:
    parts = {**EVEN, **{name: value for name, value in changed.items() if name in EVEN}}
    keys = {f"time/{part}": value for part, value in parts.items()}
    more = {f"perf/{name}": value for name, value in changed.items() if name not in EVEN}
    return {"perf/data_wait": 0.0, "perf/steady_tokens_per_second": 10.0, **keys, **more}


def verdict(window: Window) -> str:
    found = judge(window)
    assert found is not None
    return found.limiter


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (Window(row(data_wait=0.5) | {"perf/data_wait": 0.4}), DATA),
        (Window(row() | {"perf/data_wait": 0.4, "perf/host_bound": 0.0}), DEVICE),  # hidden behind the GPU's queue
        (Window(row(data_wait=0.5, host_bound=0.1)), DATA),
        (Window(row(communication=0.5)), EXCHANGE),
        (Window(row(communication=None)), DEVICE),  # inside forward and backward: not known
        (Window(row(communication=0.5, rank_spread=0.8, slowest_rank=3)), STRAGGLER),
        (Window(row(rank_spread=0.05, slowest_rank=3)), DEVICE),
        (Window(row(host_bound=0.8)), HOST),
        (Window(row(), launching=0.8), HOST),
        (Window(row(), launching=0.3), DEVICE),
        (Window(row(), saving=0.4), SAVING),
        (Window(row() | {"perf/data_wait": 0.3}, saving=0.4), SAVING),
        (Window(row() | {"perf/data_wait": 0.5}, saving=0.4), DATA),
        (Window(row(), throttled=("heat (hardware)",)), THROTTLING),
        (Window(row(), throttled=("power cap", "application clocks")), DEVICE),  # the ordinary power limit
        (Window(row() | {"perf/data_wait": 0.5}, throttled=("heat (hardware)",)), DATA),
        (Window(row(optimizer=0.9)), BANDWIDTH),
        (Window(row(of_gemm=0.7)), COMPUTE),
        (Window(row(of_gemm=0.2)), BANDWIDTH),
        (Window(row(mfu=0.5)), COMPUTE),
        (Window(row(mfu=0.1)), BANDWIDTH),
    ],
)  # fmt: skip
def test_a_verdict_names_the_largest_wait(window: Window, expected: str) -> None:
    assert verdict(window) == expected


def test_the_figures_of_a_straggler_name_its_rank() -> None:
    found = judge(Window(row(communication=0.5, rank_spread=0.8, slowest_rank=3)))
    assert found == Verdict(
        STRAGGLER, "rank 3 takes 80.0 % longer than the others, which wait for it", pytest.approx(0.8 / 1.8)
    )


def test_a_step_that_was_not_timed_has_no_verdict() -> None:
    assert judge(Window({f"time/{part}": None for part in PARTS} | {"perf/data_wait": 0.9})) is None


share = st.none() | st.floats(0, 1)


@given(st.fixed_dictionaries({part: st.floats(0, 1) for part in PARTS}), share, share, share, share, st.floats(0, 1), share)
def test_every_timed_window_has_one_verdict(
    parts: dict[str, float], host: float | None, gemm: float | None, mfu: float | None, spread: float | None, saving: float, wait: float | None
) -> None:  # fmt: skip
    given_row = {f"time/{part}": value for part, value in parts.items()}
    more = {"host_bound": host, "of_gemm": gemm, "mfu": mfu, "rank_spread": spread, "slowest_rank": 1, "data_wait": wait}
    found = judge(Window(given_row | {f"perf/{name}": value for name, value in more.items()}, saving))
    assert found is not None and found.limiter in LIMITERS and found.figures


# --- advice


def advisor_on(machine: str, recipe: str, ranks: int | None = None, **layers: str) -> Advisor:
    made = decide(recipe, machine=str(ROOT / "tests" / "machines" / f"{machine}.json"), ranks=ranks, layers=layers)
    spec = spec_for(made.resolved.recipe)
    return Advisor(made.machine, spec, made.resolved.recipe, made.world, made.plan, made.extensions.catalog)


@pytest.mark.parametrize("name", sorted({flags for rows in CANDIDATES.values() for flags in rows if flags.startswith(FLAG)}))
def test_every_candidate_is_a_layer_with_its_options(name: str) -> None:
    words = name.split()
    for flag, value in zip(words[::2], words[1::2], strict=True):
        slot, _, option = flag.removeprefix(FLAG).replace("-", "_").partition(".")
        if option:
            layer = CATALOG[words[1]]
            assert layer.slot == slot and layer.read_options({option: value}, flag)
        else:
            assert CATALOG[value].slot == slot


@pytest.mark.parametrize(("machine", "recipe", "ranks"), [("cpu-avx512-bf16", "quickstart", None), ("h100", "gpt2-124m", None), ("h100x8", "gpt-1b", 8), ("t4", "gpt2-124m", None)])  # fmt: skip
@pytest.mark.parametrize("name", LIMITERS)
def test_what_is_proposed_is_accepted_by_the_planner(machine: str, recipe: str, ranks: int | None, name: str) -> None:
    advisor = advisor_on(machine, recipe, ranks)
    advice = advisor.advise(name)
    if advice is None or not advice.startswith("--"):
        return
    words = advice.partition(" on ")[0].split()
    pairs = dict(zip(words[::2], words[1::2], strict=True))
    layers = {flag.removeprefix(FLAG): value for flag, value in pairs.items() if flag.startswith(FLAG)}
    fields = {flag.removeprefix("--").replace("-", "_"): value for flag, value in pairs.items() if not flag.startswith(FLAG)}
    made = decide(
        recipe, machine=str(ROOT / "tests" / "machines" / f"{machine}.json"), ranks=ranks, layers=layers, fields=fields
    )
    for flag, value in layers.items():
        slot, _, option = flag.replace("-", "_").partition(".")
        choice = made.plan.choice(slot)
        assert str(choice.options[option] if option else choice.layer).lower() == value
    if layers:
        assert made.plan.digest() != advisor.plan.digest(), f"{advice} changes nothing"


def test_a_slow_loader_is_met_by_a_queue_then_by_a_deeper_one() -> None:
    assert advisor_on("cpu", "quickstart").advise(DATA) == "--layer.loader prefetch"
    assert advisor_on("h100", "gpt2-124m").advise(DATA) == "--layer.loader prefetch --layer.loader.batches 4"
    deep = advisor_on("h100", "gpt2-124m", **{"loader": "prefetch", "loader.batches": "16"})
    assert deep.advise(DATA) == "--data.cache DIR on a local disk"


def test_unused_memory_is_met_by_the_largest_micro_batch_that_fits() -> None:
    small = advisor_on("h100", "gpt2-124m", **{"microbatch": "fixed", "microbatch.sequences": "1"})
    larger = small.larger_micro_batch()
    assert larger is not None
    size = int(larger.split()[-1]) if larger[-1].isdigit() else small.recipe.train.global_batch
    assert size > 1 and small.recipe.train.global_batch % size == 0
    assert "unused: --layer.microbatch" in (small.upward(None) or "")
    whole = replace(small, plan=small.planned({"microbatch": "whole"}) or small.plan)
    assert whole.larger_micro_batch() is None and whole.upward(None) is None


def test_nothing_is_proposed_that_the_plan_has() -> None:
    here = advisor_on("h100", "gpt2-124m")
    for rows in CANDIDATES.values():
        for flags in rows:
            if flags.startswith(FLAG) and "." not in flags.removeprefix(FLAG).replace("--layer.", ""):
                slot, layer = flags.removeprefix(FLAG).split()[:2]
                assert not (here.plan.layers[slot.replace("-", "_")] == layer and here.accepts(flags))
    assert LARGER in CANDIDATES["host"]


# --- the rows


def limiter_of(spent: dict[str, float], text: StringIO, trace: StepTrace | None = None, samples: Path | None = None) -> Limiter:
    recipe = recipe_of("modern")
    advisor = Advisor(probe(), spec_for(recipe), recipe, World(), plan_of(recipe), CATALOG)
    return Limiter(advisor, Console(text), lambda: spent, Pauses(), lambda: trace, samples)


def test_a_verdict_is_printed_when_it_changes() -> None:
    text, spent = StringIO(), dict.fromkeys(SPENT, 0.0)
    judged = limiter_of(spent, text)
    rows = []
    for step, wait in ((10, 0.5), (20, 0.5), (30, 0.5), (40, 0.0), (50, 0.5)):
        spent["productive"] += 1
        rows.append(judged(step, row() | {"perf/data_wait": wait}))
    assert rows[0]["perf/limiter"] is None  # there is no window yet
    assert [one["perf/limiter"] for one in rows[1:]] == [DATA, DATA, DEVICE, DATA]
    assert rows[1]["perf/advice"] == "--layer.loader prefetch"
    assert [line.split("  ")[0] for line in text.getvalue().splitlines()] == ["step 20", "step 40", "step 50"]
    assert "limited by data: waiting for batches takes 50.0 % of the steps. Try: --layer.loader prefetch" in text.getvalue()
    assert (
        judged.summary()[0] == "limit       data: waiting for batches takes 50.0 % of the steps. Try: --layer.loader prefetch"
    )


def test_checkpoints_are_judged_by_the_wall_time_of_their_window() -> None:
    spent = dict.fromkeys(SPENT, 0.0)
    judged = limiter_of(spent, StringIO())
    judged(10, row())
    spent["productive"], spent["checkpoint"] = 6.0, 4.0
    found = judged(20, row())
    assert found["perf/limiter"] == SAVING
    assert found["perf/advice"] == "--save.every 1000"
    spent["productive"] += 10
    assert judged(30, row())["perf/limiter"] == DEVICE


def test_warm_up_is_not_judged() -> None:
    judged = limiter_of(dict.fromkeys(SPENT, 0.0), StringIO())
    judged(1, row())
    assert judged(2, row() | {"perf/data_wait": 0.9, "perf/steady_tokens_per_second": None})["perf/limiter"] is None


def test_throttling_is_read_from_the_newest_whole_sample(tmp_path: Path) -> None:
    samples, spent = tmp_path / "system.jsonl", dict.fromkeys(SPENT, 0.0)
    judged = limiter_of(spent, StringIO(), samples=samples)
    judged(1, row())
    spent["productive"] = 1.0
    assert judged(2, row())["perf/limiter"] == DEVICE
    lines = [json.dumps({"gpu/throttle": reasons}) for reasons in ([], ["heat (software)"])]
    samples.write_text("\n".join(lines) + '\n{"gpu/thr')
    spent["productive"] = 2.0
    found = judged(3, row())
    assert found["perf/limiter"] == THROTTLING and found["perf/advice"] == "gptoughts doctor"


def test_the_live_row_shows_what_the_sampler_knows(tmp_path: Path) -> None:
    samples = tmp_path / "system.jsonl"
    assert gpu_fields(samples) == []
    samples.write_text('{"gpu/utilization": 97.4, "gpu/memory_bytes": 2147483648}\n')
    assert gpu_fields(samples) == ["GPU 97 %", "2.00 GiB"]
    samples.write_text('{"gpu/utilization": null, "cpu/load": 1.0}\n[3]\n')
    assert gpu_fields(samples) == []


def test_measuring_operators_takes_no_random_number() -> None:
    """The generator is that of the training's dropout: a run that was judged would go on with other bits."""
    before = torch.get_rng_state()
    assert limiter.operator_seconds(2) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_many_small_operators_are_the_hosts_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limiter, "operator_seconds", lambda: 1e-5)
    trace = StepTrace({"aten::add": Operator("aten::add", 80_000, {})}, {}, 0, 1, 1, True, True, 1.0, 0.0)
    spent = dict.fromkeys(SPENT, 0.0)
    judged = limiter_of(spent, StringIO(), trace)
    judged(1, row())
    spent["productive"] = 1.0
    assert judged(2, row(cpu_seconds=1.0))["perf/limiter"] == HOST  # 0.8 of a second
    assert judged(3, row(cpu_seconds=4.0))["perf/limiter"] == DEVICE
    assert judged(4, row())["perf/limiter"] == DEVICE  # not measured


def test_the_cost_of_an_operator_is_that_of_a_repetition_over_its_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that advances a second at each reading: a repetition takes one, and has at least a matmul and its two gradients."""
    ticks = iter(range(1_000))
    monkeypatch.setattr(limiter, "thread_time", lambda: float(next(ticks)))
    cost = operator_seconds(5)
    assert (1 / cost) == pytest.approx(round(1 / cost)) and 3 <= round(1 / cost) <= 200


def test_pauses_of_the_garbage_collector_are_measured_and_the_callback_is_removed() -> None:
    before = list(gc.callbacks)
    with Pauses() as pauses:
        began = time.perf_counter()
        gc.collect()
        outside = time.perf_counter() - began
    assert 0 < pauses.seconds <= outside
    assert gc.callbacks == before
