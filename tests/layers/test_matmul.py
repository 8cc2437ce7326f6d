"""Float32 products on other units: the switch, what it did to a number, and that everything stands as before."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptoughts.config.model_spec import spec_for
from gptoughts.errors import PlanError
from gptoughts.hardware.machine import Machine, probe, read
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.layers.matmul_tf32 import BF16_CPU, apply, verify
from gptoughts.planning.layer import Case, Kind, Status
from tests.support.engines import engine_of, plan_of, recipe_of, steps, watched

LAYER = CATALOG["tf32"]
HERE = SimpleNamespace(device=torch.device("cpu"))
HAS_UNITS = pytest.mark.skipif(
    not set(BF16_CPU) & set(probe().cpu.instruction_sets) or probe().has_older("torch", (2, 12)),
    reason="oneDNN computes in float32 on a CPU without bf16 units, and in older versions of torch",
)


def options(**given: Any) -> dict[str, Any]:
    return LAYER.read_options(given, "the test")


def switches() -> list[Any]:
    cublas, onednn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    reduced = [getattr(cublas, f"allow_{kind}_reduced_precision_reduction") for kind in ("bf16", "fp16")]
    return [torch.get_float32_matmul_precision(), cublas.fp32_precision, onednn.fp32_precision, *reduced]


@HAS_UNITS
def test_bf16_units_round_and_float32_does_not() -> None:
    before = switches()
    with apply(HERE, options(units="bf16")):
        proof = verify(HERE, None, options(units="bf16"))
        assert proof.status is Status.ACTIVE
        assert proof.figures["rounding"] == pytest.approx(2.0**-9)
    assert switches() == before
    assert verify(HERE, None, options(units="bf16")).status is Status.INACTIVE


@pytest.mark.skipif("amx_tf32" in probe().cpu.instruction_sets, reason="this CPU has TF32 units")
def test_tf32_is_no_name_for_bf16() -> None:
    """On a CPU without AMX-TF32 torch takes the switch and computes in float32; rounding to bf16 instead would be another layer."""
    with apply(HERE, options()):
        assert verify(HERE, None, options()).status is Status.INACTIVE
    with apply(HERE, options(units="bf16")):
        assert verify(HERE, None, options()).status is Status.INACTIVE


@pytest.mark.parametrize("accumulate", ["float32", "reduced"])
@pytest.mark.parametrize("found", [True, False])
def test_adding_in_bf16_is_allowed_by_name_only_and_left_as_found(accumulate: str, found: bool) -> None:
    cublas = torch.backends.cuda.matmul
    before, cublas.allow_bf16_reduced_precision_reduction = cublas.allow_bf16_reduced_precision_reduction, found
    try:
        with apply(HERE, options(accumulate=accumulate)):
            assert cublas.allow_bf16_reduced_precision_reduction is (accumulate == "reduced")
        assert cublas.allow_bf16_reduced_precision_reduction is found
    finally:
        cublas.allow_bf16_reduced_precision_reduction = before


def test_the_switches_are_put_back_after_an_error() -> None:
    before = switches()
    with pytest.raises(ZeroDivisionError), apply(HERE, options(units="bf16")):
        raise ZeroDivisionError
    assert switches() == before


@HAS_UNITS
def test_a_whole_step_is_another_one_and_near() -> None:
    recipe = recipe_of("modern")
    losses = []
    for layers in ({}, {"matmul": "tf32", "matmul.units": "bf16"}):
        with engine_of(recipe, plan_of(recipe, layers)) as engine:
            losses.append(steps(engine, 3)[-1])
            watched(engine)
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def machine(name: str) -> Machine:
    """Return a machine of tests/machines; `cpu-amx` is the one with AVX512-BF16, and AMX."""
    if name != "cpu-amx":
        return read(f"tests/machines/{name}.json")
    here = read("tests/machines/cpu-avx512-bf16.json")
    return replace(here, cpu=replace(here.cpu, instruction_sets=(*here.cpu.instruction_sets, "amx_bf16")))


@pytest.mark.parametrize(
    ("name", "given", "kind", "words"),
    [
        ("h100", {}, None, ""),
        ("h100", {"accumulate": "reduced"}, None, ""),
        ("h100", {"units": "bf16"}, Kind.UNSUPPORTED, "cuBLAS rounds float32 factors to TF32, not to bf16"),
        ("t4", {}, Kind.UNSUPPORTED, "needs compute capability 8.0, found 7.5"),
        ("cpu", {}, Kind.UNSUPPORTED, "otherwise torch computes in float32"),
        ("cpu", {"units": "bf16"}, Kind.UNSUPPORTED, "needs a CPU with AMX-BF16"),
        ("cpu-avx512-bf16", {"units": "bf16"}, Kind.UNSUPPORTED, "needs a CPU with AMX-BF16"),
        ("cpu-amx", {}, Kind.UNSUPPORTED, "--layer.matmul.units bf16"),
        ("cpu-amx", {"units": "bf16"}, Kind.SLOWER, "precision=bf16 rounds the same"),
        ("cpu-amx", {"units": "bf16", "accumulate": "reduced"}, Kind.UNSUPPORTED, "a cuBLAS setting"),
    ],
)
def test_it_says_why_it_does_not_fit(name: str, given: dict[str, Any], kind: Kind | None, words: str) -> None:
    recipe = recipe_of("modern")
    case = Case(machine(name), spec_for(recipe), recipe, World())
    reasons = LAYER.rejections(case, options(**given))
    assert any(one.kind is kind and words in str(one) for one in reasons) if kind else not reasons, reasons


def test_a_torch_that_takes_the_switch_and_does_nothing_is_refused() -> None:
    recipe, here = recipe_of("modern"), machine("cpu-amx")
    case = Case(replace(here, packages={**here.packages, "torch": "2.11.0"}), spec_for(recipe), recipe, World())
    assert any("torch 2.11.0 ignores the setting" in str(one) for one in LAYER.rejections(case, options(units="bf16")))


def test_a_demand_that_cannot_be_met_names_the_way_out() -> None:
    with pytest.raises(PlanError, match=r"units bf16"):
        plan_of(recipe_of("modern"), {"matmul": "tf32"}, machine=machine("cpu-amx"))
