"""The surgery of fp8-te, with a double in the place of Transformer Engine: same names, same arithmetic in plain torch, no FP8.

What this shows: which sites are converted, that parameters stay the model's own, what a checkpoint holds, and the undo. It shows nothing
about FP8 itself: that needs a GPU, and tests/device asks for its kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from gptoughts.config.model_spec import spec_for
from gptoughts.engine.checkpoint import state as training_state
from gptoughts.engine.checkpoint import store as checkpoint
from gptoughts.errors import LayerError
from gptoughts.hardware.machine import read
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.layers.precision_fp8_te import apply, verify
from gptoughts.planning.layer import Case, Kind, Status
from tests.support.engines import FAMILIES_UNDER_TEST, config_folder, engine_of, plan_of, recipe_of, steps, watched

LAYER = CATALOG["fp8-te"]
LLAMA = FAMILIES_UNDER_TEST["llama"] | {"config": config_folder("llama")}
FP8_KERNEL = "nvjet_sm90_qqtst_128x128_128x6_1x2_h_bz_ovscale_TNT"
ACTIVE: dict[str, Any] = {"now": 0, "recipe": None}


class Quantized(nn.Module):
    """What the doubles share: scale tensors that appear in the first forward, and a count of forwards inside `autocast`."""

    def __init__(self, gemms: int) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"num_gemms": gemms}
        self.inside = 0

    def init_fp8_meta_tensors(self, recipe: Any) -> None:
        """As the real one: makes scale and history for forward and backward, asks the context around it which recipe is meant, and keeps
        what a checkpoint has brought."""
        assert ACTIVE["recipe"] is recipe, "outside of the context a default recipe is asked"
        if "scaling_fwd" in self.fp8_meta:
            return
        for key in ("scaling_fwd", "scaling_bwd"):
            self.fp8_meta[key] = SimpleNamespace(scale=torch.ones(3), amax_history=torch.zeros(4, 3))

    def note(self, x: torch.Tensor) -> None:
        """Count, and move the history as delayed scaling does."""
        self.inside += ACTIVE["now"]
        if ACTIVE["now"]:
            self.init_fp8_meta_tensors(ACTIVE["recipe"])
            self.fp8_meta["scaling_fwd"].amax_history[0] = float(x.detach().abs().max())

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """Norm in float32, as the model's own."""
        width, weight = (x.shape[-1],), self.layer_norm_weight
        if self.normalization == "RMSNorm":
            return functional.rms_norm(x.float(), width, weight, self.eps).type_as(x)
        return functional.layer_norm(x.float(), width, weight, self.layer_norm_bias, self.eps).type_as(x)


class Linear(Quantized):
    def __init__(self, in_features: int, out_features: int, bias: bool, device: str) -> None:
        super().__init__(1)
        assert device == "meta"
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, device=device)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.note(x)
        return functional.linear(x, self.weight, self.bias)


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, eps: float, normalization: str, bias: bool, device: str) -> None:
        super().__init__(in_features, out_features, bias, device)
        self.eps, self.normalization = eps, normalization
        self.layer_norm_weight = nn.Parameter(torch.empty(in_features, device=device))
        self.layer_norm_bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.normed(x))


class LayerNormMLP(Quantized):
    def __init__(
        self, hidden_size: int, ffn_hidden_size: int, eps: float, normalization: str, activation: str, bias: bool, device: str
    ) -> None:
        super().__init__(2)
        self.eps, self.normalization, self.activation = eps, normalization, activation
        rows = ffn_hidden_size * (2 if activation == "swiglu" else 1)
        self.fc1_weight = nn.Parameter(torch.empty(rows, hidden_size, device=device))
        self.fc2_weight = nn.Parameter(torch.empty(hidden_size, ffn_hidden_size, device=device))
        self.fc1_bias = self.fc2_bias = self.layer_norm_bias = None
        self.layer_norm_weight = nn.Parameter(torch.empty(hidden_size, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.note(x)
        inner = functional.linear(self.normed(x), self.fc1_weight, self.fc1_bias)
        if self.activation == "swiglu":
            gate, up = inner.chunk(2, dim=-1)
            inner = functional.silu(gate) * up
        else:
            inner = functional.gelu(inner, approximate="tanh")
        return functional.linear(inner, self.fc2_weight, self.fc2_bias)


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the double where the import looks."""

    @contextmanager
    def autocast(enabled: bool, recipe: Any) -> Iterator[None]:
        ACTIVE.update(now=ACTIVE["now"] + enabled, recipe=recipe)
        yield
        ACTIVE.update(now=ACTIVE["now"] - enabled, recipe=None)

    names = (
        "transformer_engine",
        "transformer_engine.pytorch",
        "transformer_engine.common",
        "transformer_engine.common.recipe",
    )
    modules = {name: ModuleType(name) for name in names}
    vars(modules[names[1]]).update(Linear=Linear, LayerNormLinear=LayerNormLinear, LayerNormMLP=LayerNormMLP, autocast=autocast)
    for recipe in ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"):
        methods = {"delayed": lambda self: type(self).__name__ == "DelayedScaling"}
        setattr(modules[names[3]], recipe, type(recipe, (), methods))
    modules[names[0]].pytorch, modules[names[0]].common = modules[names[1]], modules[names[2]]  # type: ignore[attr-defined]
    modules[names[2]].recipe = modules[names[3]]  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@contextmanager
def converted(recipe: Any, options: dict[str, Any] | None = None) -> Iterator[Any]:
    """An engine with fp8-te in its precision slot; the plan would refuse it on a CPU, so the baseline's place is taken."""
    chosen = LAYER.read_options(options or {}, "the test")
    fp32 = CATALOG["fp32"]
    taken = type(LAYER)(**{**vars(fp32), "apply": lambda engine, _: apply(engine, chosen), "baseline": True})
    before, CATALOG["fp32"] = CATALOG["fp32"], taken
    try:
        with engine_of(recipe, plan_of(recipe)) as engine:
            yield engine
    finally:
        CATALOG["fp32"] = before


@pytest.mark.parametrize("family", ["gpt2", "llada", "modern"])  # those that offer sites
def test_every_site_computes_as_before_with_the_models_own_parameters(family: str) -> None:
    recipe = recipe_of(family)
    with engine_of(recipe, plan_of(recipe, {"precision": "bf16"})) as engine:
        expected = steps(engine, 3)
        names = list(engine.bare.state_dict())
    with converted(recipe) as engine:
        fused = engine.extras["fp8-te"]
        assert len(fused.sites) == fused.total == 3 * 3
        assert steps(engine, 3) == pytest.approx(expected, rel=2e-2)
        assert list(engine.bare.state_dict()) == names
        owned = {id(parameter) for parameter in engine.bare.parameters()}
        assert {id(parameter) for module in fused.modules for parameter in module.parameters()} <= owned
        assert all(module.inside == 3 for module in fused.modules)
        with torch.no_grad(), engine.eval_context():
            engine.bare(torch.zeros(1, 8, dtype=torch.long))
        assert all(module.inside == 3 for module in fused.modules), "evaluation ran in FP8"
    assert not any("forward" in vars(module) for module in engine.bare.modules())
    assert not engine.extras


def test_widths_not_divisible_by_16_stay_and_are_counted() -> None:
    recipe = recipe_of("modern", model={**FAMILIES_UNDER_TEST["modern"], "hidden": 100, "vocab_size": 128})
    with converted(recipe) as engine:
        fused = engine.extras["fp8-te"]
        assert (len(fused.sites), fused.total) == (6, 9)
        assert not any(site.kind == "norm-mlp" for site in fused.sites)
        steps(engine, 1)


def test_without_fp8_kernels_the_proof_says_no() -> None:
    with converted(recipe_of("modern")) as engine:
        proof = verify(engine, watched(engine), LAYER.read_options({}, "the test"))
    assert proof.status is Status.INACTIVE
    assert proof.text == "9 of 9 sites, 0 FP8 matmuls for 12 projections"


def test_the_scale_history_survives_a_checkpoint(tmp_path: Any) -> None:
    recipe, options = recipe_of("modern"), {"scaling": "delayed"}
    with converted(recipe, options) as engine:
        steps(engine, 2)
        saved = {name: value.clone() for name, value in engine.extras["fp8-te"].state_dict().items()}
        documents = {"plan.json": "{}"}
        folder = checkpoint.write(training_state.snapshot(engine, 2, {}, documents, {}), tmp_path)
    assert len(saved) == 9 * 2 * 2
    assert any(bool((value > 0).any()) for name, value in saved.items() if name.endswith("amax_history"))
    with converted(recipe, options) as engine:
        assert not engine.extras["fp8-te"].state_dict()
        training_state.restore(engine, folder)
        restored = engine.extras["fp8-te"].state_dict()
    assert restored.keys() == saved.keys()
    assert all(torch.equal(restored[name], saved[name]) for name in saved)


@pytest.mark.parametrize(("family", "sites", "left_out"), [("llama", 21, {}), ("deepseek", 24, {"experts": 4, "routers": 2})])
def test_models_of_transformers_get_one_module_per_projection(family: str, sites: int, left_out: dict[str, int]) -> None:
    recipe = recipe_of(family)
    with engine_of(recipe, plan_of(recipe, {"precision": "bf16"})) as engine:
        expected = steps(engine, 3)
        names = list(engine.bare.state_dict())
    with converted(recipe) as engine:
        fused = engine.extras["fp8-te"]
        assert (fused.total, dict(fused.left_out)) == (sites, left_out)
        assert all(site.kind == "linear" and site.divisible(16) for site in fused.sites)
        assert not any("embed" in site.name or "head" in site.name or "gate." in site.name for site in fused.sites)
        assert steps(engine, 3) == pytest.approx(expected, rel=2e-2)
        assert list(engine.bare.state_dict()) == names
        assert all(module.inside == 3 for module in fused.modules)
        proof = verify(engine, watched(engine), LAYER.read_options({}, "the test"))
    assert "9 sites with unsupported widths in bf16, 4 experts in bf16" in proof.text or family == "llama"
    assert not any("forward" in vars(module) for module in engine.bare.modules())


def test_a_layer_norm_without_bias_is_not_fused() -> None:
    """Transformer Engine's norm would bring a bias of its own, which the model has no parameter for."""
    recipe = recipe_of("gpt2", model={**FAMILIES_UNDER_TEST["gpt2"], "bias": False, "vocab_size": 128})
    with converted(recipe) as engine:
        fused = engine.extras["fp8-te"]
        assert [site.kind for site in fused.sites] == ["linear"] * 12
        steps(engine, 1)


def test_half_the_modules_unconverted_is_inactive_whatever_the_kernels_say() -> None:
    with converted(recipe_of("modern")) as engine:
        trace = replace(watched(engine), kernels={FP8_KERNEL: 1000})
        whole = verify(engine, trace, LAYER.read_options({}, "the test"))
        for site in engine.extras["fp8-te"].sites[::2]:
            site.at.__dict__.pop("forward")
        half = verify(engine, trace, LAYER.read_options({}, "the test"))
    assert whole.status is Status.ACTIVE, whole.text
    assert half.status is Status.INACTIVE
    assert half.text.startswith("4 of 9 sites")


def test_bf16_kernels_in_the_place_of_fp8_ones_are_inactive() -> None:
    with converted(recipe_of("modern")) as engine:
        trace = replace(watched(engine), kernels={"nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT": 1000})
        assert verify(engine, trace, LAYER.read_options({}, "the test")).status is Status.INACTIVE


def test_blocks_that_are_recomputed_run_in_fp8_again() -> None:
    """Recomputation calls a block in the backward, outside of every context; delayed scales have moved by then."""
    recipe = recipe_of("modern")
    with converted(recipe) as engine:
        fused, hidden = engine.extras["fp8-te"], torch.ones(1, 4, 64, requires_grad=True)
        site, module = fused.sites[-1], fused.modules[-1]
        site.at(hidden)
        assert module.inside == 1
        with torch.no_grad():
            site.at(hidden)
        assert module.inside == 1
    with converted(recipe, {"scaling": "delayed"}) as engine:
        with pytest.raises(LayerError, match="delayed scales change"):
            engine.extras["fp8-te"].sites[-1].at(hidden)
        steps(engine, 1)


def test_a_broken_installation_is_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    with pytest.raises(LayerError, match="transformer_engine is installed but fails to import"), converted(recipe_of("modern")):
        pass


def test_a_package_that_raises_runtime_error_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What 2.20 does on a machine without its torch part: RuntimeError, which no `except ImportError` catches."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise RuntimeError('libtransformer_engine.so not found')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(LayerError, match=r"RuntimeError: libtransformer_engine\.so not found"), converted(recipe_of("modern")):
        pass


@pytest.mark.parametrize(
    ("scaling", "machine", "words"),
    [
        ("mxfp8", "h100", "scaling mxfp8 needs compute capability 10.0 to below 12.0, found 9.0"),
        ("mxfp8", "rtx5090", "scaling mxfp8 needs compute capability 10.0 to below 12.0, found 12.0"),
        ("blockwise", "l40s", "scaling blockwise needs compute capability 9.0 to below 12.0, found 8.9"),
        ("blockwise", "h100", "needs widths divisible by 128, the model has 4160"),
        ("mxfp8", "b200x8", None),
        ("delayed", "l40s", None),
    ],
)
def test_scalings_know_their_units_and_multiples(scaling: str, machine: str, words: str | None) -> None:
    recipe = recipe_of("modern", model={"width": 4160 if words and "4160" in words else 4096, "heads": 32})
    here = read(f"tests/machines/{machine}.json")
    here = replace(here, packages={**here.packages, "transformer-engine": "2.8.0"})
    case = Case(here, spec_for(recipe), recipe, World())
    reasons = [
        str(one)
        for one in LAYER.rejections(case, LAYER.read_options({"scaling": scaling}, "the test"))
        if one.kind is Kind.UNSUPPORTED
    ]
    assert (not reasons) if words is None else any(words in reason for reason in reasons), reasons


@pytest.mark.parametrize(
    ("machine", "more", "kind", "words"),
    [
        ("a100x8-80gb", {}, Kind.UNSUPPORTED, "needs compute capability 8.9, found 8.0"),
        ("rtx4090", {}, Kind.UNSUPPORTED, "needs the package transformer-engine, not installed"),
        ("h100", {"model": {"width": 776, "heads": 4}}, Kind.UNSUPPORTED, "needs widths divisible by 16, the model has 776"),
        ("h100", {"model": {"width": 768, "heads": 12}}, Kind.SLOWER, "width 768 is below 4096"),
        (
            "h100",
            {"model": {"width": 4096, "heads": 32}, "train": {"steps": 1, "global_batch": 8}},
            Kind.SLOWER,
            "256 tokens",
        ),
        ("h100", {"model": {"width": 2048, "heads": 16}}, Kind.SLOWER, "1.10 to 1.15 of eager bf16"),
        ("h100", {"adapter": {"kind": "lora"}, "model": LLAMA}, Kind.UNSUPPORTED, "frozen projections of an adapter"),
        ("h100", {"model": {"width": 4096, "heads": 32}, "train": {"steps": 1, "global_batch": 256}}, None, ""),
    ],
)
def test_it_says_why_it_does_not_fit(machine: str, more: dict[str, Any], kind: Kind | None, words: str) -> None:
    recipe = recipe_of("modern", **more)
    case = Case(read(f"tests/machines/{machine}.json"), spec_for(recipe), recipe, World())
    reasons = LAYER.rejections(case, LAYER.read_options({}, "the test"))
    if kind is None:
        assert reasons == []
    else:
        assert any(reason.kind is kind and words in str(reason) for reason in reasons), reasons
