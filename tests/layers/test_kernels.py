"""Liger's kernels in a model: where they go, what they compute there, what proves them, what they refuse.

The kernels themselves run under Triton's interpreter in a process of its own (tests/support/liger_worker.py). Where plain functions stand in
for them they are named as stand-ins, and show only the surgery.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptoughts.config.model_spec import spec_for
from gptoughts.errors import LayerError
from gptoughts.hardware import machine
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.models.gpt.attention import rotate_both
from gptoughts.models.gpt.gpt import Attention
from gptoughts.models.kernels import liger, liger_places
from gptoughts.models.sources import meta_model
from gptoughts.planning.evidence import Status, StepTrace
from gptoughts.planning.layer import Case, Kind
from tests.layers.test_attention import packed_batches, seen
from tests.support.engines import (
    FAMILIES_UNDER_TEST,
    ROWS,
    config_folder,
    engine_of,
    family_for,
    plan_of,
    recipe_of,
    steps,
    watched,
)

ROOT = Path(__file__).parents[2]
MACHINES = Path(__file__).parents[1] / "machines"
LAYER = CATALOG["liger"]


def options(parts: str = "all") -> dict[str, Any]:
    return LAYER.read_options({"parts": parts}, "the test")


def recipe_for(kind: str) -> Any:
    """A recipe of the tests' families, or of another model type of transformers."""
    if kind in FAMILIES_UNDER_TEST:
        return recipe_of(kind)
    return recipe_of("llama", model={"family": "hf", "config": config_folder(kind), "vocab_size": ROWS})


# --- places


@pytest.mark.parametrize(
    ("kind", "wanted", "left"),
    [
        ("modern", {"norm": 13, "rope": 3, "mlp": 3}, 0),
        ("llada", {"norm": 13, "rope": 3, "mlp": 3}, 0),
        ("gpt2", {}, 0),
        ("bert", {}, 0),
        ("llama", {"norm": 7, "rope": 3, "mlp": 3}, 0),
        ("mistral", {"norm": 7, "rope": 3, "mlp": 3}, 0),
        ("qwen2", {"norm": 7, "rope": 3, "mlp": 3}, 0),
        ("qwen3", {"norm": 7, "rope": 3, "mlp": 3}, 6),  # norms of queries and keys meet a wider weight
        ("deepseek", {"norm": 7, "mlp": 3}, 9),  # and rotate interleaved pairs
    ],
)
def test_places_are_those_that_compute_what_the_kernels_compute(kind: str, wanted: dict[str, int], left: int) -> None:
    recipe = recipe_for(kind)
    port = family_for(recipe)
    found, others = liger_places.places(meta_model(recipe, port, ROWS), liger_places.PARTS)
    assert {part: there for part, there, _ in liger_places.counted(found)} == wanted
    assert len(others) == left
    assert not any(place.taken() for place in found)


def test_native_positions_are_a_place_only_where_they_are_rotary() -> None:
    recipe = recipe_of("modern", model={**FAMILIES_UNDER_TEST["modern"], "positions": "learned", "vocab_size": ROWS})
    found, left = liger_places.places(meta_model(recipe, family_for(recipe), ROWS), liger_places.PARTS)
    assert {place.part for place in found} == {"norm", "mlp"} and not left


class Norm(torch.nn.Module):
    """Somebody's RMSNorm."""

    def __init__(self, rounds: str, offset: float) -> None:
        super().__init__()
        self.weight, self.eps, self.rounds, self.offset = torch.nn.Parameter(torch.ones(8)), 1e-5, rounds, offset

    def forward(self, x: Tensor) -> Tensor:
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        if self.rounds == "before":
            return (self.offset + self.weight) * scaled.to(x.dtype)
        if self.rounds == "after":
            return ((self.offset + self.weight.float()) * scaled).to(x.dtype)
        return scaled * self.weight  # as wide as it was computed


class SomeRMSNorm(Norm):
    """A name that says what it is."""


@pytest.mark.parametrize(
    ("rounds", "offset", "casts"),
    [("before", 0.0, "llama"), ("after", 0.0, "gemma"), ("after", 1.0, "gemma"), ("never", 0.0, None), ("after", 0.5, None)],
)
def test_a_norm_is_asked_where_it_rounds_and_what_it_adds(rounds: str, offset: float, casts: str | None) -> None:
    model = torch.nn.ModuleDict({"norm": SomeRMSNorm(rounds, offset)})
    found, left = liger_places.places(model, ["norm"])
    assert [(place.casts, place.offset, place.epsilon) for place in found] == ([(casts, offset, 1e-5)] if casts else [])
    assert left == ([] if casts else ["norm"])


# --- the kernels themselves


@cache
def answers(mended: str, *asked: str) -> dict[str, Any]:
    """What the worker printed."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.support.liger_worker", mended, *asked],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("answers ")]
    assert lines, ran.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("answers "))


DEFAULT, SLOW = ("modern:all", "llama:all"), "deepseek:all"
NEEDS_LIGER = pytest.mark.skipif("liger-kernel" not in machine.probe().packages, reason="liger-kernel is not installed")


@NEEDS_LIGER
@pytest.mark.parametrize("one", [*DEFAULT, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_interpreted_kernels_train_as_the_plain_operators_do(one: str) -> None:
    """Norm, rotation and gate, forward and backward, over packed rows; applied, proven, and one place left out."""
    told = answers("mended", *([SLOW] if one == SLOW else DEFAULT))[one]
    assert told["loss"] == pytest.approx(told["plain_loss"], rel=1e-6) and told["cosine"] > 0.999999
    assert told["proof"][0] == "active" and told["half"][0] == "inactive" and told["undone"]
    if one.startswith("deepseek"):
        assert "not replaced: 9 (model.layers.0.self_attn, " in told["proof"][1]


@pytest.mark.slow
@NEEDS_LIGER
@pytest.mark.parametrize("one", ["modern:rope", "llama:rope"])
def test_rotary_positions_run_under_the_interpreter_as_it_is(one: str) -> None:
    told = answers("as-it-is", "modern:rope", "llama:rope")[one]
    assert told["cosine"] > 0.999999 and told["proof"] == ["active", "rope 3 of 3 places, 3 operators"] and told["undone"]
    assert told["half"] == ["inactive", "rope 2 of 3 places, 2 operators"]


# --- the surgery, with stand-ins for the kernels


class LigerRMSNormFunction:
    """A stand-in: what the kernel computes, in plain operators."""

    @staticmethod
    def forward(
        ctx: Any, X: Tensor, W: Tensor, eps: float, offset: float, casting_mode: str, in_place: bool, row_mode: Any
    ) -> Tensor:
        """The words of the real one."""
        raise NotImplementedError

    @staticmethod
    def apply(x: Tensor, weight: Tensor, eps: float, offset: float, casts: str, in_place: bool, row_mode: Any) -> Tensor:
        assert in_place is False
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        return (offset + weight) * scaled.to(x.dtype) if casts == "llama" else ((offset + weight.float()) * scaled).to(x.dtype)


class Rope:
    """A stand-in, with tables 1 T D or B T D."""

    @staticmethod
    def apply(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        assert cos.dim() == 3 and cos.shape[-1] == query.shape[-1]
        half = query.shape[-1] // 2
        return rotate_both(query, key, cos[:, None, :, :half], sin[:, None, :, :half])


class Gated:
    """A stand-in for gate and up apart."""

    @staticmethod
    def apply(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


class Both:
    """A stand-in for gate and up in one, which takes rows and gives rows, as the real one's gradient does."""

    @staticmethod
    def apply(projected: Tensor) -> Tensor:
        assert projected.dim() == 2
        return Gated.apply(*projected.chunk(2, dim=-1))


@pytest.fixture(params=[Both, None], ids=["both", "apart"])
def stand_ins(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain functions where the package's would be."""
    monkeypatch.setattr(liger, "kernels", lambda: liger.Kernels(LigerRMSNormFunction, Rope, Gated, request.param))


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("family", ["modern", "llama", "deepseek"])
def test_stand_ins_are_reached_in_every_place_and_leave_no_trace(family: str) -> None:
    import transformers.models.llama.modeling_llama as theirs

    recipe, function = recipe_of(family), theirs.apply_rotary_pos_emb
    with engine_of(recipe, plan_of(recipe), packed_batches()) as engine:
        plain = steps(engine, 2)
    with engine_of(recipe, plan_of(recipe), packed_batches()) as engine:
        before = [dict(module.__dict__).get("forward") for module in engine.bare.modules()]
        keys = list(engine.bare.state_dict())
        with LAYER.apply(engine, options()):
            found, _ = liger_places.places(engine.bare, liger_places.PARTS)
            assert all(place.taken() for place in found)
            assert steps(engine, 2) == pytest.approx(plain, rel=1e-6)
            proof = LAYER.verify(engine, watched(engine, 0), options())
            assert proof.status is Status.INACTIVE, "no kernel of Liger's ran"
            assert list(engine.bare.state_dict()) == keys
        assert [module.__dict__.get("forward") for module in engine.bare.modules()] == before
        assert all(module.rotate is rotate_both for module in engine.bare.modules() if isinstance(module, Attention))
    assert theirs.apply_rotary_pos_emb is function


def test_a_compiled_block_looks_up_the_rotary_function_that_was_put_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo looks globals up by the name of a module; the copy of the attention's forward has none, so it finds the new function."""
    calls = []

    class Counting(Rope):
        @staticmethod
        def apply(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            calls.append(1)  # while the graph is traced
            query, key = Rope.apply(query, key, cos, sin)
            return 2 * query, key

    monkeypatch.setattr(liger, "kernels", lambda: liger.Kernels(LigerRMSNormFunction, Counting, Gated))
    recipe, losses = recipe_of("llama"), []
    for compiled in (False, True):
        torch._dynamo.reset()
        with engine_of(recipe, plan_of(recipe)) as engine, LAYER.apply(engine, options("rope")):
            if compiled:
                for block in engine.blocks.values():
                    block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
            losses.append(steps(engine, 1)[0])
    with engine_of(recipe, plan_of(recipe)) as engine:
        plain = steps(engine, 1)[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[0] != pytest.approx(plain, rel=1e-6)
    assert len(calls) >= 4, "three blocks eagerly, and once in the graph"


def test_a_model_without_a_place_is_told() -> None:
    recipe = recipe_of("gpt2")
    with engine_of(recipe, plan_of(recipe)) as engine, pytest.raises(LayerError, match="no module of this model matches"):
        liger.install(engine.bare, liger_places.PARTS)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("raise ImportError('cannot import name libdevice')", "ImportError: cannot import name libdevice"),
        ("raise RuntimeError('0 active drivers')", "RuntimeError: 0 active drivers"),
    ],
)
def test_a_broken_package_is_quoted(text: str, wanted: str, tmp_path: Path) -> None:
    """A real module that raises, in a process of its own."""
    folder = tmp_path / "liger_kernel" / "ops"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("", encoding="utf-8")
    (folder / "__init__.py").write_text(text + "\n", encoding="utf-8")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from gptoughts.errors import LayerError\nfrom gptoughts.models.kernels import liger\n"
        "try:\n    liger.kernels()\nexcept LayerError as error:\n    print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert f"kernels=liger: liger_kernel is installed, but the import fails: {wanted}" in ran.stdout, ran.stderr[-2000:]


# --- needs


def reasons(box: str, kind: Kind, family: str = "modern", parts: str = "all", **more: Any) -> str:
    given = machine.read(MACHINES / f"{box}.json")
    given = replace(
        given, packages={**given.packages, "liger-kernel": "0.8.5"} if more.pop("installed", True) else given.packages
    )
    recipe = recipe_of(family)
    case = Case(given, spec_for(recipe), recipe, World(), **more)
    return " | ".join(str(reason) for reason in LAYER.rejections(case, options(parts)) if reason.kind is kind)


def test_needs_on_fake_machines() -> None:
    assert not reasons("h100", Kind.UNSUPPORTED)
    assert "pytorch/pytorch#141916" in reasons("h100", Kind.SLOWER)
    assert "pip install 'gptoughts[liger]'" in reasons("rtx3090", Kind.UNSUPPORTED, installed=False)
    assert "needs an NVIDIA GPU, found none" in reasons("cpu", Kind.UNSUPPORTED)
    interpreted = {"environment": {"TRITON_INTERPRET": "1"}}
    assert "--layer.kernels.parts rope" in reasons("cpu", Kind.UNSUPPORTED, **interpreted)
    assert not reasons("cpu", Kind.UNSUPPORTED, parts="rope", **interpreted)
    assert "has LayerNorm and GELU" in reasons("h100", Kind.UNSUPPORTED, family="gpt2")


# --- proofs by the names of kernels


def verdict(model: torch.nn.Module, trace: StepTrace, parts: str = "all") -> Any:
    return LAYER.verify(SimpleNamespace(device=SimpleNamespace(type="cuda"), bare=model), trace, options(parts))


def test_kernels_are_counted_by_their_names_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of one block: norm1 and norm2 and no others, rotary positions, gate."""
    monkeypatch.setattr(liger, "kernels", lambda: liger.Kernels(LigerRMSNormFunction, Rope, Gated))
    recipe = recipe_of("modern", model={**FAMILIES_UNDER_TEST["modern"], "depth": 1, "qk_norm": False, "vocab_size": ROWS})
    model = meta_model(recipe, family_for(recipe), ROWS)
    model.norm = torch.nn.Identity()
    one = seen("liger")
    assert verdict(model, one).status is Status.INACTIVE, "the old modules ran"
    liger.install(model, liger_places.PARTS)
    proof = verdict(model, one)
    assert proof.status is Status.ACTIVE
    assert proof.text == "norm 2 of 2 places, 2 kernels; rope 1 of 1 places, 2 kernels; mlp 1 of 1 places, 2 kernels"
    for gone in ("_rms_norm_forward_kernel", "_triton_rope", "_swiglu_fused_gate_up_forward_kernel"):
        fewer = replace(one, kernels={name: count for name, count in one.kernels.items() if name != gone})
        assert verdict(model, fewer).status is Status.INACTIVE, gone
    assert verdict(model, replace(one, micro_batches=2)).status is Status.INACTIVE
