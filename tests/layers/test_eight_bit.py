"""Eight-bit moments: near float32's, small, kept exactly across a restart, and refused where they cannot be."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gptoughts.config.model_spec import ModelSpec, spec_for
from gptoughts.engine.checkpoint import integrity
from gptoughts.engine.checkpoint import state as training_state
from gptoughts.engine.checkpoint import store as checkpoint
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine
from gptoughts.engine.optim import low_bit as lowbit
from gptoughts.engine.optim.factory import optimizer
from gptoughts.engine.optim.lr_schedule import set_rate
from gptoughts.errors import CheckpointError, ConfigError, LayerError
from gptoughts.hardware.machine import probe
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.models.sources import meta_model
from gptoughts.planning.layer import Case, Kind, Status
from gptoughts.planning.memory_model import baseline
from gptoughts.run.build import build_engine
from tests.support import engines
from tests.support.engines import ROWS, engine_of, family_for, objective_for, plan_of, random_batches, recipe_of, steps, watched
from tests.support.tiers import slow_except

pytest.importorskip("torchao")
pytest.importorskip("bitsandbytes")

PACKAGES = ("torchao", "bitsandbytes")
LAYER = CATALOG["8bit"]
RATE, STEPS = 1e-3, 5


def eight(package: str, **more: Any) -> dict[str, Any]:
    return {"optimizer": "8bit", "optimizer.package": package, **more}


def reached(family: str, layers: dict[str, Any]) -> tuple[list[float], list[Tensor]]:
    recipe = recipe_of(family)
    with engine_of(recipe, plan_of(recipe, layers)) as engine:
        return steps(engine, STEPS), [parameter.detach().clone() for parameter in engine.parameters()]


def furthest(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("family", ["modern", pytest.param("bert", marks=pytest.mark.slow)])
def test_weights_stay_near_those_of_float32(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight is further from float32's than half of what the rate allows, and losses agree; with embeddings in 8 bits, BERT's fly away."""
    losses, weights = reached(family, {})
    for package in PACKAGES:
        its_losses, its_weights = reached(family, eight(package))
        assert furthest(weights, its_weights) < STEPS * RATE / 2, package
        assert its_losses == pytest.approx(losses, rel=5e-3), package
    if family == "bert":
        monkeypatch.setattr("gptoughts.engine.optim.factory.sparsely_graded", lambda model: [])
        assert furthest(weights, reached(family, eight("torchao"))[1]) > 100 * STEPS * RATE


@pytest.mark.parametrize("package", PACKAGES)
def test_state_takes_a_quarter_and_half_applied_is_noticed(package: str) -> None:
    recipe = recipe_of("modern")
    options = LAYER.read_options({"package": package}, "the test")
    with engine_of(recipe, plan_of(recipe, eight(package))) as engine:
        trace = watched(engine)
        proof = LAYER.verify(engine, trace, options)
        assert proof.status is Status.ACTIVE, proof.text
        assert engine.optimizer is not None
        packed = {p: s for p, s in engine.optimizer.state.items() if lowbit.in_eight_bits(s)}
        assert len(packed) == proof.figures["packed"] == 12
        share = sum(lowbit.bytes_of(state) for state in packed.values()) / sum(8 * parameter.numel() for parameter in packed)
        assert share == pytest.approx((1 + 4 / 256) / 4, abs=1e-3)
        table = next(p for p in engine.optimizer.state if p is engine.bare.get_parameter("embed.weight"))
        assert not lowbit.in_eight_bits(engine.optimizer.state[table])
        half = next(iter(packed))
        engine.optimizer.state[half] = {"exp_avg": torch.zeros_like(half), "exp_avg_sq": torch.zeros_like(half)}
        proof = LAYER.verify(engine, trace, options)
        assert proof.status is Status.INACTIVE and "11 of 12" in proof.text


def engine_from(recipe: Any, folder: Path, skip: int, package: str) -> Any:
    family, stream = family_for(recipe), random_batches(recipe)
    for _ in range(skip):
        next(stream)
    plan, ranks = plan_of(recipe, eight(package)), Ranks(World(), torch.device("cpu"))
    model, source = meta_model(recipe, family, ROWS), training_state.Weights(folder)
    return build_engine(model, family, objective_for(recipe), recipe, plan, CATALOG, ranks=ranks, batches=stream, source=source)


def plain(engine: Engine) -> dict[str, Any]:
    """Weights and state of the engine, packed moments as what they are made of."""
    assert engine.optimizer is not None
    names = {id(parameter): name for name, parameter in engine.bare.named_parameters()}
    state = {
        f"{names[id(p)]}/{key}": value
        for p in engine.optimizer.state
        for key, value in engine.optimizer.stored(p).items()  # type: ignore[attr-defined]
    }
    return {**{name: p.detach().clone() for name, p in engine.bare.named_parameters()}, **state}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_restart_changes_no_bit(package: str, tmp_path: Path) -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, eight(package))) as engine:
        first = steps(engine, 3)
        folder = checkpoint.write(training_state.snapshot(engine, 3, {}, {}, {}), tmp_path)
        losses, whole = steps(engine, 3), plain(engine)
    assert integrity.damage(folder) == "" and len(first) == 3
    kept = load_file(folder / "optimizer.safetensors")
    codes = [name for name, tensor in kept.items() if tensor.dtype is torch.uint8]
    assert len(codes) == 24 and not any("qmap" in name for name in kept)
    with engine_from(recipe, folder, 3, package) as engine:
        training_state.restore(engine, folder)
        assert steps(engine, 3) == losses
        again = plain(engine)
    assert again.keys() == whole.keys()
    for key, value in whole.items():
        assert torch.equal(value, again[key]) if isinstance(value, Tensor) else value == again[key], key
    other = next(name for name in PACKAGES if name != package)
    with engine_from(recipe, folder, 3, other) as engine, pytest.raises(CheckpointError, match=f"{package}.AdamW8bit"):
        training_state.restore(engine, folder)


def damaged(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """States that do not fit: a moment is missing, or has another shape."""
    key = next(name for name in values if name.endswith("codes") or name == "state1")
    yield {name: value for name, value in values.items() if name != key}
    yield {**values, key: values[key][:-1]}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_state_that_does_not_fit_is_told(package: str) -> None:
    model = torch.nn.Linear(64, 64, bias=False)
    made: Any = optimizer(model, recipe_of("modern").optim, package)  # type: ignore[arg-type]
    model.weight.grad = torch.ones_like(model.weight)
    made.step()
    for wrong in damaged(made.stored(model.weight)):
        with pytest.raises(CheckpointError, match="optimizer state"):
            made.take(model.weight, wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_rate_of_every_update_is_the_one_that_was_set(package: str) -> None:
    """A rate of 0 moves nothing: torchao holds its rate in a tensor, bitsandbytes in a number."""
    model = torch.nn.Linear(64, 64)
    made = optimizer(model, recipe_of("modern").optim, package)  # type: ignore[arg-type]
    for rate, moves in ((0.0, False), (0.1, True), (0.0, False)):
        before = model.weight.detach().clone()
        set_rate(made, rate)
        model.weight.grad = torch.ones_like(model.weight)
        made.step()
        assert torch.equal(before, model.weight) is not moves


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("rows", "tied", "length", "batch"),
    slow_except(
        [(8192, True, 64, 2), (8192, False, 64, 2), (512, True, 32, 2), (2048, True, 128, 8)],
        (512, True, 32, 2),
        (2048, True, 128, 8),
    ),
    ids=["embedding", "head", "blocks", "activations"],
)
def test_a_step_holds_what_was_expected(
    package: str, rows: int, tied: bool, length: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever weighs most: an embedding in float32, a head in 8 bits, the update's own memory for the blocks, or the forward."""
    for name, value in (("ROWS", rows), ("LENGTH", length), ("BATCH", batch)):
        monkeypatch.setattr(engines, name, value)
    sizes = {"family": "gpt", "width": 192, "depth": 4, "heads": 6, "kv_heads": 3, "tied": tied}
    monkeypatch.setitem(engines.FAMILIES_UNDER_TEST, "modern", sizes)
    recipe = recipe_of("modern")
    plan = plan_of(recipe, eight(package, attention="sdpa"))
    assert plan.memory is not None and plan.memory.budget is not None
    with engine_of(recipe, plan) as engine:
        trace = watched(engine)
        assert engine.optimizer is not None
        held = sum(lowbit.bytes_of(state) for state in engine.optimizer.state.values())
    assert plan.memory.budget.optimizer == pytest.approx(held, rel=0.02)
    assert trace.peak_bytes is not None
    error = plan.memory.budget.peak / trace.peak_bytes - 1
    assert abs(error) <= 0.15, f"expected {plan.memory.budget.to_json()}, held {trace.peak_bytes} ({error:+.0%})"


@pytest.mark.parametrize(("kind", "whole"), [("none", 100 + 600), ("lora", 0)])
def test_embeddings_and_fused_experts_keep_eight_bytes(kind: str, whole: int) -> None:
    """Of 8 experts, two of which are chosen, 450 weights are idle: they have 600."""
    recipe = recipe_of("modern", adapter={"kind": kind})
    spec = ModelSpec(
        family="gpt", width=64, depth=1, vocab_size=8, sequence_length=8, parameters=1000, embedding_parameters=100,
        active_parameters=550, experts=8, experts_per_token=2, heads=2,
    )  # fmt: skip
    budget = baseline(spec, recipe, 1)
    assert budget is not None
    changed = LAYER.memory(Case(probe(), spec, recipe, World()), LAYER.read_options({}, "the test"), budget)
    assert changed.optimizer == 8 * whole + int((budget.optimizer - 8 * whole) * (1 + 4 / 256) / 4)


def refused(recipe: Any, package: str = "torchao", **machine: Any) -> list[str]:
    case = Case(dataclasses.replace(probe(), **machine), spec_for(recipe), recipe, World())
    reasons = LAYER.rejections(case, LAYER.read_options({"package": package}, "the test"))
    return [str(reason) for reason in reasons if reason.kind is Kind.UNSUPPORTED]


def test_refusals() -> None:
    assert "optim.name is muon" in refused(recipe_of("modern", optim={"name": "muon"}))[0]
    here = probe().packages
    for package in PACKAGES:
        without = {name: version for name, version in here.items() if name != package}
        assert f"needs the package {package}" in refused(recipe_of("modern"), package, packages=without)[0]
    with pytest.raises(ConfigError, match="8-bit state is for AdamW only"):
        optimizer(torch.nn.Linear(2, 2), recipe_of("modern", optim={"name": "lion"}).optim, "torchao")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_that_is_missing_or_broken_is_quoted(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise RuntimeError('built for another machine')")
    monkeypatch.syspath_prepend(str(tmp_path))
    optim, model = recipe_of("modern").optim, torch.nn.Linear(2, 2)
    with pytest.raises(LayerError, match=f"{package} is installed, but the import fails: RuntimeError: built for another"):
        optimizer(model, optim, package)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, package, None)
    missing = {"torchao": "needs the package torchao", "bitsandbytes": "bitsandbytes: package not installed"}
    with pytest.raises(LayerError, match=missing[package]):
        optimizer(model, optim, package)  # type: ignore[arg-type]


def test_fp16_scales_and_eight_bits_keep() -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, eight("torchao", precision="fp16"))) as engine:
        trace = watched(engine, 2)
        for name in ("8bit", "fp16"):
            layer = CATALOG[name]
            assert layer.verify(engine, trace, layer.read_options({}, "the test")).status is Status.ACTIVE
