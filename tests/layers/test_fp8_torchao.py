"""FP8 through torchao, emulated: what is converted and what is not, whose parameters it works on, its proof and its sabotage."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gptoughts.config.model_spec import spec_for
from gptoughts.engine.checkpoint import state as training_state
from gptoughts.engine.checkpoint import store as checkpoint
from gptoughts.errors import LayerError
from gptoughts.hardware.machine import read
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.models.kernels.fusion import projections
from gptoughts.planning.evidence import Operator
from gptoughts.planning.layer import Case, Kind, Status
from gptoughts.planning.profile import pick
from gptoughts.planning.resolve import resolve
from tests.layers.test_contract import gradient
from tests.support.engines import FAMILIES_UNDER_TEST, config_folder, engine_of, plan_of, recipe_of, steps, watched

pytest.importorskip("torchao", reason="the package is not installed")

LAYER = CATALOG["fp8-torchao"]
OPTIONS = LAYER.read_options({}, "the test")
FP8 = {"precision": "fp8-torchao"}
E4M3, E5M2, BF16 = "c10::Float8_e4m3fn", "c10::Float8_e5m2", "c10::BFloat16"
LORA = {"kind": "lora", "rank": 4, "alpha": 8}


def quantized(engine: Any) -> list[str]:
    return [name for name, module in engine.bare.named_modules() if getattr(module, "in_eight_bits", False)]


@pytest.mark.parametrize(
    ("family", "converted", "left_out"),
    [
        ("modern", 12, "nothing else in the blocks"),
        ("llada", 12, "nothing else in the blocks"),
        ("llama", 21, "nothing else in the blocks"),
        ("deepseek", 15, "9 with unsupported widths, 4 experts, 2 routers"),
        ("bert", 18, "nothing else in the blocks"),
    ],
)
def test_projections_in_the_blocks_are_converted_and_the_rest_is_counted(family: str, converted: int, left_out: str) -> None:
    recipe = recipe_of(family)
    with engine_of(recipe, plan_of(recipe, {"precision": "bf16"})) as engine:
        expected, names = steps(engine, 3), list(engine.bare.state_dict())
        classes = [type(module) for module in engine.bare.modules()]
    with engine_of(recipe, plan_of(recipe, FP8)) as engine:
        found = quantized(engine)
        assert len(found) == converted
        assert all(any(name.startswith(f"{block}.") for block in engine.blocks) for name in found)
        assert not any(name.rpartition(".")[2] in ("gate", "head", "lm_head", "embed") for name in found)
        assert steps(engine, 3) == pytest.approx(expected, rel=2e-2)
        assert list(engine.bare.state_dict()) == names
        assert all(parameter.dtype is torch.float32 for parameter in engine.bare.parameters())
        proof = LAYER.verify(engine, watched(engine, warm=0), OPTIONS)
    assert proof.status is Status.ACTIVE
    assert "emulated" in proof.text
    assert proof.text.endswith(f"in bf16: {left_out}")
    assert [type(module) for module in engine.bare.modules()] == classes


def test_the_undone_model_has_the_weights_that_were_trained() -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, FP8)) as engine:
        steps(engine, 2)
        trained = {name: value.clone() for name, value in engine.bare.state_dict().items()}
        ids = torch.zeros(1, 8, dtype=torch.long)
        with torch.no_grad():
            inside = engine.bare(ids)
    assert all(torch.equal(value, trained[name]) for name, value in engine.bare.state_dict().items())
    with torch.no_grad():
        assert torch.equal(engine.bare(ids), inside), "evaluation multiplies as the plain model does"


def test_evaluation_runs_in_bf16() -> None:
    recipe = recipe_of("modern")
    ids, logits = torch.arange(16).view(1, 16), []
    for layers in ({"precision": "bf16"}, FP8):
        with engine_of(recipe, plan_of(recipe, layers)) as engine, torch.no_grad(), engine.eval_context():
            logits.append(engine.bare(ids))
    assert torch.equal(*logits)


def test_a_checkpoint_is_one_of_the_plain_model(tmp_path: Path) -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, FP8)) as engine:
        steps(engine, 2)
        weights = {name: value.clone() for name, value in engine.bare.state_dict().items()}
        folder = checkpoint.write(training_state.snapshot(engine, 2, {}, {"plan.json": "{}"}, {}), tmp_path)
        assert not engine.extras
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() <= weights.keys()
    assert all(torch.equal(value, weights[name]) and value.dtype is torch.float32 for name, value in saved.items())


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("family", ["modern", "llama"])
def test_the_gradient_stays_near_the_baselines(family: str, scaling: str) -> None:
    recipe = recipe_of(family)
    (loss, flat), (other, its) = gradient(recipe, {}), gradient(recipe, {**FP8, "precision.scaling": scaling})
    assert loss != other
    assert abs(loss - other) < 1e-2 * loss
    assert torch.nn.functional.cosine_similarity(flat, its, dim=0) > 0.98


def test_an_adapters_own_parts_stay_and_its_base_is_converted() -> None:
    pytest.importorskip("peft")
    from gptoughts.models.adapters.adapter import NAME

    part = torch.nn.Linear(64, 16)
    base = torch.nn.ModuleDict({"base_layer": torch.nn.Linear(64, 64), "lora_A": torch.nn.ModuleDict({NAME: part})})
    block = torch.nn.ModuleDict({"query": base})
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([block])})
    found = projections(model, {"layers.0": block})
    assert list(found.linears) == ["layers.0.query.base_layer"]
    assert found.left_out == {"adapter parts": 1}


def test_odd_widths_are_skipped_and_counted() -> None:
    recipe = recipe_of("modern", model={**FAMILIES_UNDER_TEST["modern"], "hidden": 100, "vocab_size": 128})
    with engine_of(recipe, plan_of(recipe, FP8)) as engine:
        proof = LAYER.verify(engine, watched(engine), OPTIONS)
    assert proof.status is Status.ACTIVE
    assert proof.text.startswith(
        "6 of 6 projections converted, 18 emulated FP8 matmuls, 12 of them backward, at least 18 and 12 needed; in bf16: 6 with unsupported widths"
    )
    assert proof.figures["skipped"] == 6


def test_half_the_modules_unconverted_is_inactive() -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, FP8)) as engine:
        for name in quantized(engine)[::2]:
            parent, _, own = name.rpartition(".")
            old = engine.bare.get_submodule(name)
            plain = torch.nn.Linear(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
            plain.__dict__["_parameters"] = old._parameters
            engine.bare.get_submodule(parent)._modules[own] = plain
        proof = LAYER.verify(engine, watched(engine), OPTIONS)
    assert proof.status is Status.INACTIVE
    assert proof.text.startswith("6 of 12 projections converted, 18 emulated FP8 matmuls, 12 of them backward")


def test_modules_that_multiply_in_bf16_all_the_same_are_inactive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted by class, the old product inside."""
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, FP8)) as engine:
        kind = type(engine.bare.get_submodule(quantized(engine)[0]))
        monkeypatch.setattr(kind, "forward", torch.nn.Linear.forward)
        proof = LAYER.verify(engine, watched(engine), OPTIONS)
    assert proof.status is Status.INACTIVE
    assert "12 of 12 projections converted, 0 emulated FP8 matmuls, 0 of them backward, at least 36 and 24 needed" in proof.text


def test_a_package_that_raises_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, plan = recipe_of("modern"), plan_of(recipe_of("modern"), FP8)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with (
        pytest.raises(LayerError, match=r"torchao is installed, but the import fails: .*torchao\.float8"),
        engine_of(recipe, plan),
    ):
        pass


def gpu_sight(operator: dict[tuple[str, ...], int], kernels: dict[str, int], regions: int) -> Any:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, FP8)) as engine:
        trace = watched(engine)
        scaled = Operator("aten::_scaled_mm", sum(operator.values()), operator)
        seen = replace(trace, operators={"aten::_scaled_mm": scaled}, kernels=kernels, regions=regions)
        there = SimpleNamespace(device=torch.device("cuda"), bare=engine.bare, blocks=engine.blocks)
        return LAYER.verify(there, seen, OPTIONS)


GOOD = {(E4M3, E4M3): 12, (E5M2, E4M3): 24}
KERNEL = "nvjet_sm90_qqtst_128x128_128x6_1x2_h_bz_ovscale_TNT"


@pytest.mark.parametrize(
    ("operator", "kernels", "regions", "status", "words"),
    [
        (GOOD, {KERNEL: 36}, 3, Status.ACTIVE, "by 36 FP8 kernels"),
        (GOOD, {KERNEL: 36}, 0, Status.ACTIVE, "uncompiled FP8 ran at 0.23"),
        (
            {**GOOD, (E5M2, E4M3): 23},
            {KERNEL: 36},
            3,
            Status.INACTIVE,
            "35 FP8 matmuls, 23 of them backward, at least 36 and 24",
        ),
        ({(E4M3, E4M3): 24, (E4M3, E5M2): 12}, {KERNEL: 36}, 3, Status.INACTIVE, "36 FP8 matmuls, 12 of them backward"),
        ({(BF16, BF16): 36}, {KERNEL: 36}, 3, Status.INACTIVE, "0 FP8 matmuls, 0 of them backward, at least 36 and 24 needed"),
        ({(E4M3, E4M3): 24, (E4M3, E5M2): 24}, {KERNEL: 36}, 3, Status.INACTIVE, "by 36 FP8 kernels"),
        (GOOD, {"nvjet_sm90_tst_256x160": 36}, 3, Status.INACTIVE, "by 0 FP8 kernels"),
        (GOOD, {}, 3, Status.UNPROVEN, "the profiler saw no kernel"),
    ],
)
def test_on_a_gpu_operators_and_kernels_must_show_it(
    operator: dict[tuple[str, ...], int], kernels: dict[str, int], regions: int, status: Status, words: str
) -> None:
    proof = gpu_sight(operator, kernels, regions)
    assert proof.status is status
    assert words in proof.text


def test_blocks_are_one_graph_and_share_it() -> None:
    """What `fullgraph=True` asks of every block; the graph alone, because inductor takes minutes and fuses emulated products away."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, FP8)) as engine:
        expected = steps(engine, 2)
    with engine_of(recipe, plan_of(recipe, FP8)) as engine:
        for block in engine.blocks.values():
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        assert steps(engine, 2) == pytest.approx(expected, rel=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


RECOMPUTED = {"recompute": "recompute-blocks"}


@pytest.mark.parametrize(("layers", "products"), [({}, 36), (RECOMPUTED, 48), ({"recompute": "recompute-ops"}, 36)])
def test_forwards_that_run_again_hide_no_product_of_the_backward(
    layers: dict[str, Any], products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputation runs the forward's products twice; a backward in bf16 is noticed all the same."""
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, {**FP8, **layers})) as engine:
        trace = watched(engine)
        proof = LAYER.verify(engine, trace, OPTIONS)
        assert proof.status is Status.ACTIVE, proof.text
        assert (proof.figures["products"], proof.figures["backward"]) == (products, 24)
        casts = trace.operators["aten::_to_copy"]
        fewer = {given: calls for given, calls in casts.input_dtypes.items() if given[0] != E5M2}
        seen = replace(trace, operators={**trace.operators, casts.name: replace(casts, input_dtypes=fewer)})
        proof = LAYER.verify(engine, seen, OPTIONS)
        assert proof.status is Status.INACTIVE and "0 of them backward" in proof.text


def test_row_wise_recomputation_is_proven_only_by_four_products() -> None:
    recipe, options = recipe_of("modern"), LAYER.read_options({"scaling": "rowwise"}, "the test")
    with engine_of(recipe, plan_of(recipe, {**FP8, "precision.scaling": "rowwise", **RECOMPUTED})) as engine:
        trace = watched(engine)
        proof = LAYER.verify(engine, trace, options)
        assert proof.status is Status.ACTIVE and "48 emulated FP8 matmuls, at least 36 needed" in proof.text
        casts = trace.operators["aten::_to_copy"]
        for calls, status in ((94, Status.UNPROVEN), (70, Status.INACTIVE)):
            fewer = replace(casts, input_dtypes={(E4M3,): calls})
            seen = replace(trace, operators={**trace.operators, casts.name: fewer})
            assert LAYER.verify(engine, seen, options).status is status


def test_of_a_frozen_projection_the_gradient_of_the_input_is_needed() -> None:
    """But in the first block, whose input may carry none: 12 forward, and 8 in the others."""
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, FP8)) as engine:
        trace = watched(engine)
        frozen = [engine.bare.get_submodule(name).weight for name in quantized(engine)]
        for weight in frozen:
            weight.requires_grad_(False)
        proof = LAYER.verify(engine, trace, OPTIONS)
    assert (proof.figures["expected"], proof.figures["expected_backward"]) == (20, 8)
    assert "at least 20 and 8 needed" in proof.text


def test_emulated_products_inside_compiled_regions_cannot_be_told() -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, FP8)) as engine:
        trace = watched(engine)
        for regions, status in ((3, Status.UNPROVEN), (0, Status.INACTIVE)):
            assert LAYER.verify(engine, replace(trace, operators={}, regions=regions), OPTIONS).status is status


WIDE = {"width": 4096, "heads": 32}
MANY = {"steps": 1, "global_batch": 256}


@pytest.mark.parametrize(
    ("machine", "more", "scaling", "kind", "words"),
    [
        ("h100", {"model": WIDE, "train": MANY}, "tensorwise", None, ""),
        ("h100", {"model": WIDE, "train": MANY}, "rowwise", Kind.SLOWER, "row-wise at"),
        ("h100", {"model": {"width": 768, "heads": 12}}, "tensorwise", Kind.SLOWER, "width 768 is below 1536"),
        (
            "h100",
            {"model": WIDE, "train": {"steps": 1, "global_batch": 8}},
            "tensorwise",
            Kind.SLOWER,
            "256 tokens per forward",
        ),
        ("h100", {"model": {"width": 776, "heads": 4}}, "tensorwise", Kind.UNSUPPORTED, "divisible by 16, the model has 776"),
        ("rtx3090", {"model": WIDE, "train": MANY}, "tensorwise", Kind.UNSUPPORTED, "needs compute capability 8.9, found 8.6"),
        ("t4", {"model": WIDE}, "tensorwise", Kind.UNSUPPORTED, "needs compute capability 8.9, found 7.5"),
        ("cpu", {}, "tensorwise", Kind.SLOWER, "matmuls are emulated"),
        (
            "h100",
            {"model": {"family": "hf", "config": config_folder("gpt2")}},
            "tensorwise",
            Kind.UNSUPPORTED,
            "gpt2 uses conv1d",
        ),
        (
            "cpu",
            {"data": {"sequence_length": 7, "tokenizer": "chars", "format": "text"}},
            "tensorwise",
            Kind.UNSUPPORTED,
            "found 28",
        ),
    ],
)
def test_it_says_why_it_does_not_fit(machine: str, more: dict[str, Any], scaling: str, kind: Kind | None, words: str) -> None:
    here = read(f"tests/machines/{machine}.json")
    here = replace(here, packages={**here.packages, "torchao": "0.18.0"})
    recipe = recipe_of("modern", **more)
    case = Case(here, spec_for(recipe), recipe, World())
    reasons = LAYER.rejections(case, LAYER.read_options({"scaling": scaling}, "the test"))
    assert any(one.kind is kind and words in str(one) for one in reasons) if kind else not reasons, reasons


def test_without_the_package_it_names_the_extra() -> None:
    recipe = recipe_of("modern")
    case = Case(read("tests/machines/cpu.json"), spec_for(recipe), recipe, World())
    assert "needs the package torchao, not installed (pip install 'gptoughts[lowbit]')" in str(
        LAYER.rejections(case, OPTIONS)[0]
    )


@pytest.mark.parametrize(("width", "heads", "precision"), [(768, 12, "bf16"), (4096, 32, "fp8-torchao")])
def test_hopper_takes_fp8_where_it_pays_and_keeps_the_compiler(width: int, heads: int, precision: str) -> None:
    machine = read("tests/machines/h100.json")
    machine = replace(machine, packages={**machine.packages, "torchao": "0.18.0"})
    recipe = recipe_of("modern", model={"width": width, "heads": heads}, train=MANY)
    plan = resolve(pick("auto", machine), machine, spec_for(recipe), recipe, World(), CATALOG)
    assert (plan.layers["precision"], plan.layers["compile"]) == (precision, "compile-blocks")
    if precision == "bf16":
        over = dict(plan.choice("precision").rejected)
        assert "width 768 is below 1536" in str(over["fp8-torchao"][0])
        assert "width 768 is below 4096" in str(over["fp8-te"][0])
