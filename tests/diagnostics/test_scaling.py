"""`gptoughts bench scaling`: equal settings or no comparison, what a speed-up is, time in collectives, ranks that end together."""

from __future__ import annotations

import csv
import json
import os
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from gptoughts.api import decide
from gptoughts.cli.main import main
from gptoughts.diagnostics.bench.children import Result
from gptoughts.diagnostics.bench.collectives import collective_times, exposed, length, union
from gptoughts.diagnostics.bench.equal_settings import GLOBAL_BATCH, refuse_unequal
from gptoughts.diagnostics.bench.picture import draw_scaling
from gptoughts.diagnostics.bench.scaling import communication, scaling, wall_seconds
from gptoughts.diagnostics.bench.scaling_arms import BASE, STRONG, WEAK, arms_of, default_ranks, request_of, strategies_in
from gptoughts.diagnostics.bench.scaling_table import CSV_HEAD, scaling_csv, scaling_markdown, scaling_text
from gptoughts.diagnostics.bench.training import open_training
from gptoughts.diagnostics.bench.variant import Job
from gptoughts.diagnostics.bench.variant_process import RankGroup, VariantFailed, merged, start_variant
from gptoughts.errors import ConfigError, PlanError
from gptoughts.hardware.machine import read
from gptoughts.layers import CATALOG
from tests.support.bench_settings import PLAIN, asked, fields_in, flags_of

MACHINES = Path(__file__).parents[1] / "machines"


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, str]:
    """A tiny recipe over a text of its own."""
    return fields_in(tmp_path)


# --- what is compared


def test_arms_differ_in_the_slot_parallel_alone(fields: dict[str, str]) -> None:
    setting, ask = asked(fields)
    request = request_of(setting, "2,4", "ddp", {}, None)
    assert request.ranks == (1, 2, 4) and request.threads == 1, "1 is added, and CPUs get one thread per rank"
    found = arms_of(setting, ask, request)
    assert list(found.arms) == [BASE, "strong ddp x2", "strong ddp x4", "weak ddp x2", "weak ddp x4"]
    assert [arm.global_batch for arm in found.arms.values()] == [4, 4, 4, 8, 16]
    base = found.jobs[BASE]
    assert not base.rank_environments and base.environment["OMP_NUM_THREADS"] == "1"
    for name, job in found.jobs.items():
        differing = {key for key in {*base.layers, *job.layers} if base.layers.get(key) != job.layers.get(key)}
        assert {key.partition(".")[0] for key in differing} <= {"parallel"}, name
        assert job.warmup_steps == base.warmup_steps and job.profiled_steps == base.profiled_steps > 0
        assert len(job.rank_environments) == (0 if name == BASE else found.arms[name].ranks)
        assert all(one["OMP_NUM_THREADS"] == "1" for one in job.rank_environments)
    assert found.jobs["weak ddp x2"].fields["train.global_batch"] == "8"


def test_a_strategy_that_cannot_run_is_an_error_if_named_and_left_out_otherwise(fields: dict[str, str]) -> None:
    setting, ask = asked({**fields, "train.global_batch": "3"})
    odd = request_of(setting, "2", "ddp", {}, None, [WEAK])
    assert arms_of(setting, ask, odd).jobs["weak ddp x2"].fields["train.global_batch"] == "6", "weak scaling always divides"
    with pytest.raises(PlanError, match=r"strong ddp x2 cannot run: .*not divisible"):
        arms_of(setting, ask, type(odd)(odd.ranks, odd.strategies, 1, (STRONG,)))
    found = arms_of(setting, ask, type(odd)(odd.ranks, odd.strategies, 1, (STRONG, WEAK), demanded=False))
    assert list(found.arms) == [BASE, "weak ddp x2"] and "not divisible" in found.left_out["strong ddp x2"]


def test_strategies_and_ranks_come_from_catalog_and_machine(fields: dict[str, str]) -> None:
    assert "ddp" in strategies_in(CATALOG) and all(not CATALOG[name].baseline for name in strategies_in(CATALOG))
    eight = read(str(MACHINES / "h100x8.json"))
    assert default_ranks(eight, 16) == (1, 2, 4, 8) and default_ranks(eight, 12) == (1, 2, 4)
    setting = decide("quickstart", fields=fields, layers={**PLAIN, "host": "threads"}, machine=eight)
    assert 1 <= request_of(setting, "1,4", None, {}, None).threads <= 8, "an even share of the cores"
    with pytest.raises(ConfigError, match="--ranks: 16 ranks need as many GPUs, this machine has 8"):
        request_of(setting, "1,16", None, {}, None, [WEAK])


def test_settings_that_a_process_changed_by_itself_are_refused(fields: dict[str, str]) -> None:
    """The published 7.6 x on 4 GPUs: TF32 and evaluation mode in one arm only."""
    with open_training(asked(fields)[0]) as training:
        base = training.settings()
        assert base["modules in evaluation mode"] == 0 and base[GLOBAL_BATCH] == 4
        assert not any(key.startswith("layer.parallel") for key in base)
        training.engine.model.eval()
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("high")
            other = training.settings()
        finally:
            torch.set_float32_matmul_precision(before)
    assert refuse_unequal({BASE: [base], "x2": [base, base]}, {BASE: 4, "x2": 4})["threads per rank"] >= 1
    with pytest.raises(ConfigError) as refused:
        refuse_unequal({BASE: [base], "x2": [base, other]}, {BASE: 4, "x2": 4})
    said = str(refused.value)
    assert f"float32 matmul precision: '{before}' in 1 process, 'high' in x2, rank 1" in said
    assert "modules in evaluation mode: 0 in 1 process" in said and said.count("\n") == 2
    with pytest.raises(ConfigError, match=r"recipe\.train\.global_batch: 8 in 1 process, 4 in x2"):
        refuse_unequal({BASE: [base], "x2": [base]}, {BASE: 4, "x2": 8})
    with pytest.raises(ConfigError, match=r"recipe\.seed: 1337 in 1 process, None in x2"):
        refuse_unequal({BASE: [base], "x2": [{k: v for k, v in base.items() if k != "recipe.seed"}]}, {BASE: 4, "x2": 4})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ranks", "0"], "--ranks: '0': not whole numbers of at least 1"),
        (["--ranks", "1,two"], "--ranks: 'two': not whole numbers"),
        (["--ranks", "1,2,2"], "--ranks: 2 is given twice"),
        (["--ranks", "1"], "--ranks: 1 alone compares nothing"),
        (["--ranks", "1,3"], "train.global_batch: 4 is not divisible by 3 ranks, such as --train.global-batch 3 or 6"),
        (["--ranks", "2", "--strategies", "dpd"], "'dpd' is no such strategy (did you mean 'ddp'?)"),
        (["--strategies", "single"], "'single' is measured in any case, as the base"),
        (["--ranks", "0", "--strategies", "dpd"], "'dpd' is no such strategy"),
        (["--layer.parallel", "ddp"], "--layer.parallel: bench scaling sets this slot. Found ddp.\n  Try: --strategies ddp"),
        (["--only", "both"], "'--only'"),
        (["--to", "x.txt"], "must end in .json"),
    ],
)
def test_bad_input_is_one_error(
    words: list[str], said: str, fields: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = [word for key, value in fields.items() for word in (f"--{key}", value)]
    with pytest.raises(SystemExit) as left:
        main(["bench", "scaling", "quickstart", *flags, *words])
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and error.count("error:") + error.count("Error") == 1


# --- arithmetic


def test_speed_up_is_of_tokens_within_a_round() -> None:
    base, arm = [2.0, 4.0, 2.0], [1.25, 2.5, 1.0]
    found = scaling(base, arm, 2)
    assert found["speed_up"]["median"] == 1.6 and found["efficiency"]["median"] == 0.8
    assert scaling(base, [2.5, 5.0, 2.5], 2, work=2)["speed_up"]["median"] == 1.6, "weak: twice the tokens"
    assert wall_seconds(Result(start_seconds=10, seconds=[0.5, 1.5]), 3) == 16
    profiled = [{"step": 2.0, "collectives": 0.5, "exposed": 0.1}, {"step": 1.0, "collectives": 0.25, "exposed": 0.05}]
    assert communication(profiled)["in_collectives"]["median"] == 0.25 and communication(profiled)["exposed"]["median"] == 0.05
    assert communication([])["exposed"] is None


spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda two: (min(two), max(two))), max_size=12)


@given(spans, spans)
def test_time_is_counted_once(exchanging: list[tuple[int, int]], computing: list[tuple[int, int]]) -> None:
    covered = {moment for began, ended in exchanging for moment in range(began, ended)}
    busy = {moment for began, ended in computing for moment in range(began, ended)}
    assert length(exchanging) == len(covered) and exposed(exchanging, computing) == len(covered - busy)
    found = union(exchanging)
    assert all(one[1] < other[0] for one, other in pairwise(found))


def test_an_exchange_is_seen_by_the_profiler() -> None:
    """A group of one rank, whose gloo has the same records; its time is within the step, and nothing is seen without it."""
    engine: Any = SimpleNamespace(device=torch.device("cpu"))
    value = torch.ones(1 << 20)

    def step() -> float:
        value.add_(1)
        if dist.is_initialized():
            dist.all_reduce(value)
        return 1.0

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        seen = collective_times(engine, step)
    finally:
        dist.destroy_process_group()
    assert 0 < seen.exposed <= seen.collectives < 1.0 and seen.step == 1.0
    assert collective_times(engine, step).collectives == 0


def test_ranks_answer_as_one() -> None:
    one = {"seconds": 1.0, "losses": [1.5, 1.0], "peak_bytes": 10, "held_bytes": 5, "free_bytes": 9, "settings": {"a": 1}}
    one |= {"evidence": [{"status": "active"}], "collectives": [{"step": 1}], "steps": 2}
    two = {**one, "seconds": 2.0, "peak_bytes": 12, "free_bytes": 8, "evidence": [{"status": "inactive"}]}
    found = merged([one, two])
    assert found["losses"] == [1.5, 1.0], "every rank holds the loss of the step"
    assert (found["seconds"], found["peak_bytes"], found["held_bytes"], found["free_bytes"]) == (2.0, 12, 10, 8)
    assert found["peak_bytes_of_ranks"] == [10, 12] and found["settings_of_ranks"] == [{"a": 1}] * 2
    assert len(found["collectives"]) == 2 and [line["status"] for line in found["evidence"]] == ["active", "inactive"]
    assert merged([one, {**two, "peak_bytes": None}])["peak_bytes"] is None


def test_a_rank_that_fails_ends_the_others(fields: dict[str, str]) -> None:
    """Rank 1 has a plan of other options and never joins; rank 0 would wait for it for minutes."""
    setting, ask = asked(fields)
    job = arms_of(setting, ask, request_of(setting, "2", "ddp", {}, None, [STRONG])).jobs["strong ddp x2"]
    wrong = Job(**{**job.to_json(), "digest": "another"})
    group = start_variant(wrong)
    assert isinstance(group, RankGroup) and len(group.ranks) == 2
    with group:
        group.ranks[0].job = job
        with pytest.raises(VariantFailed, match=r"LayerError: rank \d: bench: the plan changed between parent and child"):
            group.request(wrong.to_json())
    assert all(child.process.poll() is not None for child in group.ranks)


# --- table


def made_run() -> dict[str, Any]:
    """A run with a measured, an oversubscribed and a failed arm."""
    times = {"median": 1000.0, "q1": 990.0, "q3": 1010.0, "min": 900.0, "max": 1100.0}
    flat = dict.fromkeys(times, 1.0)
    base = {
        "kind": BASE, "strategy": "single", "ranks": 1, "global_batch": 16, "oversubscribed": False, "start_seconds": 5.0, "evidence": {},
        "failure": "", "step_ms": times, "tokens_per_second": 4096.0, "wall_seconds": 20.0, "peak_bytes": 2**30, "in_collectives": None,
        "exposed": None, "speed_up": flat, "efficiency": flat, "wall_speed_up": 1.0, "loss_difference": 0.0,
    }  # fmt: skip
    faster = dict.fromkeys(times, 1.9)
    two = {
        **base, "kind": "strong", "strategy": "x", "ranks": 2, "speed_up": faster, "efficiency": dict.fromkeys(times, 0.95),
        "in_collectives": {**flat, "median": 0.1}, "exposed": {**flat, "median": 0.03}, "evidence": {"parallel": "active: equal weights"},
    }  # fmt: skip
    failed = {"kind": "weak", "strategy": "x", "ranks": 2, "global_batch": 32, "oversubscribed": False}
    failed |= {"start_seconds": None, "evidence": {}, "failure": "out of memory"}
    return {
        "recipe": "bench-10m", "model": {"parameters": 10_745_472, "sequence_length": 256}, "global_batch": 16, "threads_per_rank": 1,
        "machine": {"label": "CPU: 2 cores", "cores": 2, "torch": "2.13.0"}, "load_averages": [1.5, 2.0], "busy_before": True, "plan": {"precision": "fp32"},
        "rounds": 5, "steps_per_round": 1, "processes": "interleaved", "seconds_in_all": 60.0, "command": "gptoughts bench scaling",
        "memory": "peak", "left_out": {"strong y x2": "needs a GPU"},
        "arms": {BASE: base, "strong x x2": two, "strong x x4": {**two, "ranks": 4, "oversubscribed": True}, "weak x x2": failed},
    }  # fmt: skip


def test_table_csv_and_picture(tmp_path: Path) -> None:
    run = json.loads(json.dumps(made_run()))
    for text in (scaling_text(run), scaling_markdown([run], "s.png")):
        for word in ("95.0 %", "10.0 %", "1.900", "3.0 %", "strong x x4 *", "oversubscribed", "not counted, out of memory",
                     "needs a GPU", "equal weights", "1 thread per rank", "the machine was shared: load 1.5 on 2 cores"):  # fmt: skip
            assert word in text, word
    rows = list(csv.DictReader(scaling_csv([run]).splitlines()))
    assert [row["run"] for row in rows] == list(run["arms"]) and set(rows[0]) == set(CSV_HEAD)
    assert (rows[1]["speed_up"], rows[1]["efficiency"], rows[1]["step_ms_q3"]) == ("1.9", "0.95", "1010.0")
    assert rows[3]["speed_up"] == rows[3]["step_ms"] == "" and rows[3]["failure"] == "out of memory"
    draw_scaling(run, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_one_and_two_ranks_from_the_command_line(
    fields: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scaling.json"
    words = ["--ranks", "2", "--strategies", "ddp", "--rounds", "2", "--steps", "2", "--to", str(out)]
    with pytest.raises(SystemExit) as left:
        main(["bench", "scaling", "quickstart", *flags_of(fields), *words])
    said = capsys.readouterr()
    assert left.value.code == 0, said.err
    assert "--ranks without 1" in said.out and "round 2 of 2" in said.err
    run = json.loads(out.read_text(encoding="utf-8"))["runs"][0]
    assert list(run["arms"]) == [BASE, "strong ddp x2", "weak ddp x2"] and run["settings"]["threads per rank"] == 1
    for name, row in run["arms"].items():
        ranks, work = row["ranks"], row["global_batch"] / 4
        assert not row["failure"] and len(row["rounds_ms"]) == 2, name
        ratios = [work * one / other for one, other in zip(run["arms"][BASE]["rounds_ms"], row["rounds_ms"], strict=True)]
        assert row["speed_up"]["max"] == pytest.approx(max(ratios), rel=1e-2)
        assert row["efficiency"]["median"] == pytest.approx(row["speed_up"]["median"] / ranks, abs=1e-3)
        assert len(row["peak_bytes_of_ranks"]) == ranks
        assert row["oversubscribed"] == (ranks > len(os.sched_getaffinity(0)))
        assert 0 <= row["exposed"]["median"] <= row["in_collectives"]["median"] < 1
        assert (row["in_collectives"]["median"] > 0) == (ranks > 1)
    assert run["arms"]["strong ddp x2"]["loss_difference"] < 1e-4, "the same training"
    assert run["arms"]["strong ddp x2"]["evidence"]["parallel"].startswith("active: 2 ranks")
    assert all(out.with_suffix(end).stat().st_size for end in (".md", ".csv", ".png"))
