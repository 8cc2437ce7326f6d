"""Sharded training is the same training: losses and weights of one process, 1/N on each rank, and a proof that can say no."""

from __future__ import annotations

from typing import Any

import pytest

from gptoughts.config.model_spec import spec_for
from gptoughts.hardware import machine
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.planning.layer import Case, Kind
from gptoughts.planning.memory_model import baseline
from tests.support.engines import plan_of, recipe_of
from tests.support.sharded_jobs import OPTIM, Sets, Trained, expect_equal, job, record, slow_or_long, trainings

# Gathered bf16 weights round norms too, and fp8 scales what was rounded: their losses differ like two bf16 runs.
JOBS = [
    job("modern"),
    job("llama", "llama"),
    job("llada", "llada"),
    job("bert", "bert", weight=1e-3),
    job("deepseek", "deepseek"),
    job("bf16", loss=1e-3, weight=1e-2, layers={"precision": "bf16"}),
    job("fp8", loss=5e-3, weight=2e-2, layers={"precision": "fp8-torchao"}),
    job("recompute-blocks", layers={"recompute": "recompute-blocks"}),
    job("recompute-ops", layers={"recompute": "recompute-ops"}),
    job("fused-ce", layers={"loss": "fused-ce", "optimizer": "fused", "attention": "sdpa"}),
    job("kept", layers={"parallel.reshard": "false"}),
    job("compiled", layers={"compile": "compile-blocks"}),
    job("lion", recipe={"optim": {"name": "lion", **OPTIM}}),
]
DEFAULT = JOBS[0]["name"]
HYBRID = job("hybrid", layers={"parallel.replicas": "2"})
NAMED = {one["name"]: one for one in (*JOBS, HYBRID)}
SETS: Sets = {
    "default": {2: (DEFAULT,)},
    "all": {2: ("llama", "llada", "bert", "deepseek", "bf16", "fp8", "compiled")},
    "long": {
        2: ("recompute-blocks", "recompute-ops", "fused-ce", "kept", "lion"), 3: (DEFAULT, "llada"), 4: ("hybrid",),
    },
}  # fmt: skip
"""Tier -> ranks -> jobs. Three ranks divide no dimension of the models."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trainings(tmp_path_factory, SETS, NAMED)


def test_two_ranks_train_as_one_process(trained: Trained) -> None:
    expect_equal(trained, NAMED[DEFAULT], 2, "default")


def test_the_proof_counts_shards_and_refuses_an_optimizer_made_before_sharding(trained: Trained) -> None:
    found = record(trained(2, "default"), DEFAULT, 2)
    assert found["status"] == "active", found["proof"]
    assert "(1/2)" in found["proof"]
    figures = found["figures"]
    assert 0.5 * figures["total_bytes"] <= figures["held_bytes"] <= 0.55 * figures["total_bytes"]
    assert figures["state_bytes"] <= 0.55 * 2 * figures["total_bytes"]
    assert found["negative"] == {"optimizer made before sharding": True, "restored": True}
    assert found["inactive"] == []


@pytest.mark.parametrize(("tier", "ranks", "name"), slow_or_long(SETS))
def test_every_family_and_layer_trains_as_one_process(trained: Trained, tier: str, ranks: int, name: str) -> None:
    expect_equal(trained, NAMED[name], ranks, tier)
    found = record(trained(ranks, tier), name, ranks)
    assert found["status"] == "active", found["proof"]
    assert found["inactive"] == [], "layers of the plan that sharding makes inactive"


def case_of(ranks: int, **recipe: Any) -> Case:
    """A tiny training on 8 H100."""
    made = recipe_of(**recipe)
    return Case(machine.read("tests/machines/h100x8.json"), spec_for(made), made, World(0, 0, ranks, ranks))


def reasons(ranks: int, options: dict[str, Any], **recipe: Any) -> str:
    layer, case = CATALOG["fsdp2"], case_of(ranks, **recipe)
    return "; ".join(str(reason) for reason in layer.rejections(case, layer.read_options(options, "the test")))


def test_what_cannot_be_sharded_is_rejected_with_the_reason() -> None:
    assert "more than one process" in reasons(1, {})
    assert reasons(1, {"offload": "true"}) == ""
    assert "needs collectives on CPU tensors" in reasons(2, {"offload": "true"})
    assert "not divisible by 8 ranks (--train.global-batch 8, or --gpus 4)" in reasons(8, {})
    assert "replicas = 3 does not divide 2 ranks" in reasons(2, {"replicas": "3"})
    assert "muon needs whole matrices" in reasons(2, {}, optim={"name": "muon"})
    assert reasons(2, {}) == ""


@pytest.mark.parametrize("other", sorted(CATALOG["fsdp2"].clashes))
def test_clashes_name_layers_that_exist(other: str) -> None:
    assert other in CATALOG


def test_memory_of_a_rank_is_a_shard_and_the_gathered_blocks() -> None:
    layer, case = CATALOG["fsdp2"], case_of(4, train={"steps": 10, "global_batch": 8})
    whole = baseline(case.spec, case.recipe, 2)
    assert whole is not None
    shard = layer.memory(case, layer.read_options({}, "the test"), whole)
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(shard, part) == -(-getattr(whole, part) // 4)
    assert shard.activations == whole.activations
    assert whole.cast_weights < shard.cast_weights < whole.weights
    hybrid = layer.memory(case, layer.read_options({"replicas": "2"}, "the test"), whole)
    assert hybrid.weights == -(-whole.weights // 2)
    host = layer.memory(case, layer.read_options({"offload": "true"}, "the test"), whole)
    assert (host.weights, host.gradients, host.optimizer) == (0, 0, 0)


def test_profiles_shard_only_what_does_not_fit() -> None:
    from gptoughts.api import decide

    fits = decide("gpt2-124m", machine="tests/machines/h100x8.json", ranks=8).plan
    large = decide("deepseek-large", machine="tests/machines/b200x8.json", ranks=8).plan
    assert (fits.layers["parallel"], large.layers["parallel"]) == ("ddp", "fsdp2")
    (name, why), *_ = large.choice("parallel").rejected
    assert name == "ddp"
    assert [reason.kind for reason in why] == [Kind.SLOWER]
    assert "a replica does not fit" in str(why[0])
    assert large.layers["recompute"] == "recompute-ops", "earlier slots count on the shards, not on a replica"
    assert fits.memory is not None
    assert "with --layer.parallel fsdp2" in fits.table()


def test_a_clashing_layer_is_refused_with_both_names() -> None:
    with pytest.raises(Exception, match=r"fsdp2 and 8bit clash|8bit and fsdp2 clash"):
        plan_of(recipe_of(), {"parallel": "fsdp2", "optimizer": "8bit"}, World(0, 0, 2, 2))
