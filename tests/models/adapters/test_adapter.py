"""Adapters train on a frozen base, work with the optimization layers, and are initialized, packed, saved and restored."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from gptoughts.config.recipe import AdapterConfig
from gptoughts.errors import ConfigError
from gptoughts.layers import CATALOG
from gptoughts.models.adapters.adapter import (
    adapted,
    adapter_layers,
    base_name,
    is_trained,
    matched_targets,
    projections,
)
from gptoughts.models.adapters.merge import merge, summary
from gptoughts.models.adapters.weights import AdapterSource
from gptoughts.models.family import FAMILIES
from gptoughts.models.sources import Initialization, meta_model
from gptoughts.planning.layer import Status
from tests.engine.test_ddp import launch
from tests.models.adapters import adapter_worker
from tests.models.adapters.adapters import State, adapted_engine, weights
from tests.support.engines import NEEDS_INDUCTOR, ROWS, engine_of, plan_of, random_batches, recipe_of, steps, watched
from tests.support.tiers import slow_except

KINDS = ["lora", "rslora", "dora", "pissa"]


def config(kind: str = "lora", **more: Any) -> AdapterConfig:
    return AdapterConfig(kind=kind, **{"rank": 4, "alpha": 8.0, **more})


def same_batch(count: int, ragged: bool = False) -> Any:
    return iter([next(random_batches(recipe_of(), ragged))] * count)


@pytest.mark.parametrize("form", ["modern", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_at_the_base(kind: str, form: str) -> None:
    recipe = recipe_of(form)
    ids = torch.randint(0, ROWS, (2, 16), generator=torch.Generator().manual_seed(0))
    with engine_of(recipe, plan_of(recipe)) as plain, adapted_engine(config(kind), form) as engine, torch.no_grad():
        assert torch.allclose(engine.bare(ids), plain.bare(ids), atol=1e-5)
        if kind != "pissa":  # PiSSA moves part of the base into the adapter
            values = weights(plain.bare)
            for name, value in engine.bare.named_parameters():
                assert is_trained(name) or torch.equal(value, values[base_name(name)])


@pytest.mark.parametrize(
    ("kind", "base"), slow_except(itertools.product(KINDS, ["full", "nf4"]), ("lora", "full"), ("dora", "nf4"))
)
def test_only_the_adapter_moves_and_the_loss_falls(kind: str, base: str) -> None:
    with adapted_engine(config(kind, base=base), batches=same_batch(25)) as engine:
        before = weights(engine.bare)
        losses = steps(engine, 25)
        moved = {name for name, value in engine.bare.named_parameters() if not torch.equal(value, before[name])}
        assert moved == {name for name in before if is_trained(name)}
        assert losses[-1] < losses[0] - 0.1
        assert engine.optimizer is not None
        assert {id(p) for p in engine.optimizer.state} == {id(p) for p in engine.parameters()}
        assert len(engine.parameters()) == len(moved) == 3 * 4 * (3 if kind == "dora" else 2)


def test_the_first_values_depend_on_seed_and_name_alone() -> None:
    with (
        adapted_engine(config()) as one,
        adapted_engine(config(targets="down")) as two,
        adapted_engine(config(), "modern") as again,
    ):
        first, part, second = weights(one.bare), weights(two.bare), weights(again.bare)
    assert all(torch.equal(first[name], second[name]) for name in first)
    shared = [name for name in part if is_trained(name)]
    assert shared and all(torch.equal(first[name], part[name]) for name in shared)
    spread = first["blocks.0.mlp.down.lora_A.default.weight"]
    assert abs(float(spread.std()) * (3 * spread.shape[1]) ** 0.5 - 1) < 0.1  # variance of peft's uniform initialization


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("base", ["full", "nf4"])
def test_accumulated_gradients_are_those_of_the_whole_batch(kind: str, base: str) -> None:
    recipe = recipe_of()
    plan = plan_of(recipe, {"microbatch": "fixed", "microbatch.sequences": 1})
    with (
        adapted_engine(config(kind, base=base), batches=same_batch(2, ragged=True)) as whole,
        adapted_engine(config(kind, base=base), plan=plan, batches=same_batch(2, ragged=True)) as parts,
    ):
        assert steps(whole, 2) == pytest.approx(steps(parts, 2), abs=1e-5)
        for one, two in zip(whole.parameters(), parts.parameters(), strict=True):
            assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa"])
@pytest.mark.parametrize("base", ["full", "nf4"])
def test_saved_values_come_back_bit_for_bit(kind: str, base: str) -> None:
    with adapted_engine(config(kind, base=base), batches=same_batch(6)) as engine:
        steps(engine, 3)
        there = weights(engine.bare)
        saved = {name: value for name, value in there.items() if is_trained(name)}
        with adapted_engine(config(kind, base=base), saved=State(saved)) as again:
            assert all(torch.equal(value, there[name]) for name, value in again.bare.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["full", "nf4"])
def test_merged_weights_compute_the_same_under_the_names_of_the_base(kind: str, base: str) -> None:
    recipe = recipe_of("gpt2")
    ids = torch.randint(0, ROWS, (2, 16), generator=torch.Generator().manual_seed(1))
    with adapted_engine(config(kind, base=base), "gpt2", batches=same_batch(5)) as engine, torch.no_grad():
        with torch.enable_grad():
            steps(engine, 5)
        merged = merge(engine.bare)
        engine.bare.eval()
        wanted = engine.bare(ids)
    with engine_of(recipe, plan_of(recipe)) as plain, torch.no_grad():
        assert merged.keys() == {name for name, _ in plain.bare.named_parameters()}
        assert not torch.allclose(plain.bare(ids), wanted, atol=1e-3)
        plain.bare.load_state_dict(merged, strict=False)
        assert torch.allclose(plain.bare(ids), wanted, atol=1e-5)


# --- layers of speed


@NEEDS_INDUCTOR
@pytest.mark.slow
def test_compiled_recomputed_bf16_layers_prove_themselves_on_an_adapted_model() -> None:
    recipe = recipe_of()
    wanted = {"attention": "sdpa", "precision": "bf16", "recompute": "recompute-blocks", "compile": "compile-blocks"}
    with adapted_engine(config(), plan=plan_of(recipe, wanted), batches=same_batch(40)) as engine:
        before = weights(engine.bare)
        trace = watched(engine, 1)
        for name in ("bf16", "compile-blocks"):
            proof = CATALOG[name].verify(engine, trace, {})
            assert proof.status is Status.ACTIVE, proof.text
        losses = steps(engine, 25)
        assert losses[-1] < losses[0] - 0.1
        assert all(torch.equal(value, before[name]) for name, value in engine.bare.named_parameters() if not is_trained(name))


@pytest.mark.parametrize(
    ("kind", "base", "dropout"),
    slow_except([("lora", "full", 0.0), ("dora", "full", 0.1), ("dora", "nf4", 0.0)], ("lora", "full", 0.0)),
)
def test_a_block_is_one_graph(kind: str, base: str, dropout: float) -> None:
    torch.compiler.reset()
    with adapted_engine(config(kind, base=base, dropout=dropout), batches=same_batch(6)) as engine:
        plain = float(engine.objective(engine.model.eval(), next(same_batch(1))[0]).detach())
        for block in engine.blocks.values():
            block.compile(fullgraph=True, dynamic=False, backend="eager")
        assert float(engine.objective(engine.model, next(same_batch(1))[0]).detach()) == pytest.approx(plain, rel=1e-5)
        losses = steps(engine, 2)
    assert losses[1] < losses[0]


@pytest.mark.parametrize(("slot", "layer"), [("recompute", "recompute-blocks"), ("loss", "fused-ce"), ("precision", "bf16")])
@pytest.mark.parametrize("base", slow_except(["full", "nf4"], "nf4"))
def test_layers_are_active_and_compute_the_same(slot: str, layer: str, base: str) -> None:
    recipe = recipe_of()
    with adapted_engine(config(base=base), batches=same_batch(9)) as plain:
        wanted = steps(plain, 3)
    with adapted_engine(config(base=base), plan=plan_of(recipe, {slot: layer}), batches=same_batch(9)) as engine:
        assert steps(engine, 3) == pytest.approx(wanted, rel=2e-2 if layer == "bf16" else 1e-5)
        options = next(choice.options for choice in plan_of(recipe, {slot: layer}).choices if choice.layer == layer)
        proof = CATALOG[layer].verify(engine, watched(engine, 0), options)
        assert proof.status is Status.ACTIVE, proof.text


@pytest.mark.slow
def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    adapter_worker.main(str(tmp_path / "ranks1"))
    ran = launch(2, "-m", "tests.models.adapters.adapter_worker", str(tmp_path / "ranks2"))
    assert ran.returncode == 0, ran.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"ranks{ranks}.json").read_text()) for ranks in (1, 2))
    assert one["losses"] == pytest.approx(two["losses"], abs=1e-6)
    assert one["moved"] == two["moved"] == one["trained"]
    assert two["proven"]
    ours, theirs = (load_file(tmp_path / f"ranks{ranks}.safetensors") for ranks in (1, 2))
    assert all((weight - theirs[name]).abs().max() < 1e-5 for name, weight in ours.items())


def test_dropout_is_in_training_alone() -> None:
    with adapted_engine(config(dropout=0.5), batches=same_batch(9)) as engine, torch.no_grad():
        with torch.enable_grad():
            steps(engine, 3)
        batch = next(same_batch(1))[0]
        losses = [float(engine.objective(engine.bare.train(mode), batch)) for mode in (True, True, False, False)]
    assert losses[0] != losses[1]
    assert losses[2] == losses[3]


# --- ports and words


def test_the_other_ports_go_on_and_fused_sites_are_not_offered() -> None:
    recipe, family = recipe_of(), FAMILIES["gpt"]
    mine = adapted(family, config())
    model = meta_model(recipe, mine, ROWS)
    assert mine.sites is None and family.sites is not None
    assert list(mine.blocks(model)) == list(family.blocks(model))
    assert mine.tied(model) == [("head.weight", "embed.weight")]
    assert mine.head is not None and mine.head(model) is model.head
    assert mine.attentions is not None and len(mine.attentions(model)) == 3
    assert mine.initial is not None and family.initial is not None
    for name, value in model.named_parameters():
        if not is_trained(name):
            assert mine.initial(name, value.shape, recipe.model) == family.initial(base_name(name), value.shape, recipe.model)
    assert all(value.is_meta for value in model.parameters())


def test_targets_that_are_not_there_are_told_with_what_is() -> None:
    recipe = recipe_of()
    for targets, told in [
        ("q_proj", "'q_proj'.*\n  Try: --adapter.targets with some of qkv, out, gate_up, down"),
        ("gate_upp", r"'gate_upp' \(did you mean 'gate_up'\?\)"),
        ("qkv, head", "'head'"),
        (" , ", "adapter.targets: empty"),
    ]:
        with pytest.raises(ConfigError, match=told):
            meta_model(recipe, adapted(FAMILIES["gpt"], config(targets=targets)), ROWS)
    with pytest.raises(ConfigError, match="no blocks"):
        matched_targets("all-linear", [])
    with pytest.raises(ConfigError, match=r"at most the 64 singular values of .*Found 65"):
        meta_model(recipe, adapted(FAMILIES["gpt"], config("pissa", rank=65)), ROWS)


@given(st.sets(st.sampled_from(["qkv", "out", "gate_up", "down", "mlp.down", "blocks.1.mlp.down"]), min_size=1))
@settings(max_examples=40, deadline=None)
def test_words_choose_every_projection_that_they_end(words: set[str]) -> None:
    inner = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    known = [f"blocks.{block}.{name}" for block, name in itertools.product(range(3), inner)]
    found = matched_targets(", ".join(sorted(words)), known)
    assert found == [name for name in known if any(f".{name}".endswith(f".{word}") for word in words)]


def test_the_summary_counts() -> None:
    recipe = recipe_of()
    for base in ("full", "nf4"):
        model = meta_model(recipe, adapted(FAMILIES["gpt"], config(base=base, targets="qkv, down")), ROWS)
        plain = meta_model(recipe, FAMILIES["gpt"], ROWS)
        trained = 3 * 4 * (64 + 128 + 192 + 64)
        told = summary(model)
        total = trained + sum(value.numel() for value in plain.parameters())
        assert told.startswith(f"adapter: {trained:,} of {total:,} parameters trained")
        assert "rank 4, scale 2 on 3 x qkv, 3 x down" in told
        assert ("12 projections in NF4" in told) is (base == "nf4")
        assert len(adapter_layers(model)) == 6 and len(projections(FAMILIES["gpt"], plain)) == 12


def test_a_packed_base_is_read_a_projection_at_a_time() -> None:
    recipe, family = recipe_of(), FAMILIES["gpt"]
    model = meta_model(recipe, adapted(family, config(base="nf4")), ROWS)
    source = AdapterSource(Initialization(family, recipe.model, 1), model)
    held = []
    for name, value in model.named_parameters():
        source.tensor(name, value.shape)
        held.append(sum(part.numel() for part in source._last[1].values() if part is not None and part.dtype == torch.float32))
    assert 0 < max(held) <= 64 * 384 * (1 + 1 / 64)  # the largest projection and its magnitudes
