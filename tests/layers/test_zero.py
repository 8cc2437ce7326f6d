"""ZeRO by DeepSpeed trains as one process does, shards what its stage says, and its proof says no without it."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptoughts.hardware import machine
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.planning.layer import Case
from gptoughts.planning.memory_model import baseline
from tests.layers.test_fsdp2 import case_of
from tests.support.engines import plan_of, recipe_of
from tests.support.sharded_jobs import OPTIM, Job, Sets, Trained, expect_equal, job, launch, record, slow_or_long, trainings

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the package deepspeed")
STAGES = (1, 2, 3)


def zero(name: str, stage: int, family: str = "modern", loss: float = 1e-5, weight: float = 1e-4, **more: Any) -> Job:
    """A training with ZeRO, and the bounds of its largest difference from one process."""
    layers = {"parallel": f"zero{stage}", **more.pop("layers", {})}
    return job(f"{name}-{stage}", family, loss, weight, layers=layers, **more)


FUSED = {"loss": "fused-ce", "optimizer": "fused", "attention": "sdpa"}
# Each family and each layer once, with the stage that it could disturb most. Stage 3 gathers weights, and reduces gradients, of linear
# layers in bfloat16.
JOBS = [
    *(zero("modern", stage) for stage in STAGES),
    zero("llada", 3, "llada"),
    zero("llama", 2, "llama"),
    zero("bert", 3, "bert", weight=1e-3),
    zero("deepseek", 3, "deepseek"),
    *(zero("bf16", stage, loss=1e-3, weight=1e-2, layers={"precision": "bf16"}) for stage in (2, 3)),
    zero("fp8", 2, loss=5e-3, weight=2e-2, layers={"precision": "fp8-torchao"}),
    zero("recompute-blocks", 3, layers={"recompute": "recompute-blocks"}),
    zero("recompute-ops", 3, layers={"recompute": "recompute-ops"}),
    zero("fused", 3, layers=FUSED),
    zero("compiled", 2, layers={"compile": "compile-blocks"}),
    zero("lion", 3, recipe={"optim": {"name": "lion", **OPTIM}}),
    zero("offload", 1, layers={"parallel.offload": "true"}),
    zero("offload", 3, layers={"parallel.offload": "true"}),
    zero("offload-weights", 3, layers={"parallel.offload-weights": "true"}),
]
NAMED = {one["name"]: one for one in JOBS}
DEFAULT = ("modern-2", "modern-3")
SLOW = ("modern-1", "llada-3", "bert-3", "deepseek-3", "bf16-3", "fp8-2", "compiled-2", "offload-1", "offload-weights-3")
SETS: Sets = {
    "default": {2: DEFAULT},
    "all": {2: SLOW},
    "long": {2: tuple(name for name in NAMED if name not in (*DEFAULT, *SLOW)), 3: ("modern-2", "modern-3")},
}
"""Tier -> ranks -> jobs. Three ranks divide no dimension of the models."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trainings(tmp_path_factory, SETS, NAMED)


@pytest.mark.parametrize("name", DEFAULT)
def test_two_ranks_train_as_one_process(trained: Trained, name: str) -> None:
    expect_equal(trained, NAMED[name], 2, "default")


@pytest.mark.parametrize("name", DEFAULT)
def test_the_proof_counts_partitions_and_refuses_an_update_without_deepspeed(trained: Trained, name: str) -> None:
    found = record(trained(2, "default"), name, 2)
    assert found["status"] == "active", found["proof"]
    figures, stage = found["figures"], int(name[-1])
    assert 0.5 * figures["trained_bytes"] <= figures["updated_bytes"] <= 0.55 * figures["trained_bytes"]
    assert figures["state_bytes"] <= 0.55 * 2 * figures["trained_bytes"]
    share = 0.55 if stage == 3 else 1.0
    assert figures["held_bytes"] <= share * figures["trained_bytes"]
    assert found["negative"] == {"optimizer made before sharding": True, "no sharding": True, "restored": True}
    assert found["inactive"] == []


@pytest.mark.parametrize(("tier", "ranks", "name"), slow_or_long(SETS))
def test_every_family_and_layer_trains_as_one_process(trained: Trained, tier: str, ranks: int, name: str) -> None:
    expect_equal(trained, NAMED[name], ranks, tier)
    found = record(trained(ranks, tier), name, ranks)
    assert found["status"] == "active", found["proof"]
    assert found["inactive"] == [], "layers of the plan that ZeRO makes inactive"


@pytest.mark.slow
def test_one_rank_with_its_state_in_host_memory_trains_as_a_plain_process(tmp_path: Path) -> None:
    """As on a single GPU: the layers open a process group of their own."""
    ways = {
        "fsdp2": {"parallel": "fsdp2", "parallel.offload": "true"},
        "zero3": {"parallel": "zero3", "parallel.offload-weights": "true"},
    }
    jobs = [job("plain"), *({**job(name, layers=layers), "one_rank": True} for name, layers in ways.items())]
    launch(1, tmp_path, jobs)
    plain = record(tmp_path, "plain", 1)["losses"]
    for name in ways:
        found = record(tmp_path, name, 1)
        assert found["losses"] == pytest.approx(plain, rel=1e-5)
        assert (found["status"], found["inactive"]) == ("active", []), found["proof"]
        assert found["negative"]["optimizer made before sharding"]


def reasons(stage: int, ranks: int, options: dict[str, str], **recipe: object) -> str:
    layer, case = CATALOG[f"zero{stage}"], case_of(ranks, **recipe)
    packages = {**case.machine.packages, "deepspeed": "0.19.8"}
    case = replace(case, machine=replace(case.machine, packages=packages))
    return "; ".join(str(reason) for reason in layer.rejections(case, layer.read_options(options, "the test")))


@pytest.mark.parametrize("stage", STAGES)
def test_what_zero_cannot_train_is_rejected_with_the_reason(stage: int) -> None:
    assert "more than one process" in reasons(stage, 1, {})
    assert reasons(stage, 1, {"offload": "true"}) == ""
    assert "muon does not update flattened parameter groups" in reasons(stage, 2, {}, optim={"name": "muon"})
    assert "not divisible by 8 ranks" in reasons(stage, 8, {})
    assert reasons(stage, 2, {}) == ""


def test_a_machine_without_deepspeed_is_told_what_to_install() -> None:
    layer, case = CATALOG["zero2"], case_of(2)
    assert "pip install 'gptoughts[deepspeed]'" in "; ".join(
        map(str, layer.rejections(case, layer.read_options({}, "the test")))
    )


def test_stage_three_refuses_compiled_blocks_with_the_flag_that_helps() -> None:
    with pytest.raises(Exception, match=r"cannot be compiled \(--layer.compile eager\)"):
        plan_of(recipe_of(), {"parallel": "zero3", "compile": "compile-blocks"}, World(0, 0, 2, 2))


@pytest.mark.parametrize("other", sorted({name for stage in STAGES for name in CATALOG[f"zero{stage}"].clashes}))
def test_clashes_name_layers_that_exist(other: str) -> None:
    assert other in CATALOG


def test_each_stage_needs_less_memory_than_the_one_before() -> None:
    case = case_of(4, train={"steps": 10, "global_batch": 8})
    whole = baseline(case.spec, case.recipe, 2)
    assert whole is not None
    budgets = [
        CATALOG[f"zero{stage}"].memory(case, {"offload": False, "offload_weights": False, "bucket_mb": 1}, whole)
        for stage in STAGES
    ]
    quarter = -(-whole.weights // 4)
    assert [one.weights for one in budgets] == [whole.weights + quarter, whole.weights + quarter, 2 * quarter]
    assert all(one.optimizer == -(-whole.optimizer // 4) for one in budgets)
    assert budgets[0].gradients > budgets[1].gradients == budgets[2].gradients
    host = CATALOG["zero3"].memory(case, {"offload": False, "offload_weights": True, "bucket_mb": 1}, whole)
    assert (host.weights, host.optimizer) == (0, 0)
    on_cpu = Case(machine.read("tests/machines/cpu.json"), case.spec, case.recipe, case.world)
    same = CATALOG["zero3"].memory(on_cpu, {"offload": False, "offload_weights": True, "bucket_mb": 1}, whole)
    assert same.weights == 2 * quarter, "host memory is where a CPU trains"
