"""Attention layers: what they compute, which masks they are given, what proves them, and what they refuse.

FlashAttention's packages and torch's varlen_attn run on no CPU: where a stand-in has their place it is named as such, and shows only
that layouts, words and documents arrive as those functions take them.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from gptoughts.config.model_spec import spec_for
from gptoughts.engine.engine import Engine
from gptoughts.errors import LayerError, PlanError
from gptoughts.hardware import machine
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.models.gpt import flash, flex, sdpa
from gptoughts.models.gpt.attention import document_mask, math_attention
from gptoughts.models.gpt.masks import BLOCK, Documents, block_mask, lengths
from gptoughts.planning.evidence import Operator, Status, StepTrace
from gptoughts.planning.layer import Case, Kind
from gptoughts.run import step_trace
from tests.support.engines import BATCH, LENGTH, ROWS, compile_quickly, engine_of, plan_of, recipe_of, steps, watched

TRACES = Path(__file__).parents[1] / "traces"
MACHINES = Path(__file__).parents[1] / "machines"
LAYERS = ("sdpa", "flex", "varlen", "fa2", "fa3", "fa4")


def positions_of(rows: list[list[int]], length: int) -> Tensor:
    """Rows whose documents have these lengths; what is left of a row is one more."""
    made = []
    for documents in rows:
        counted = [position for size in documents for position in range(size)][:length]
        made.append(counted + list(range(length - len(counted))))
    return torch.tensor(made)


def per_document(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, causal: bool, scale: float | None = None
) -> Tensor:
    """The plain reference: a softmax over each document by itself."""
    made = torch.zeros(*query.shape[:3], value.shape[3], dtype=value.dtype)
    for row in range(len(positions)):
        starts = [0, *(i for i in range(1, positions.shape[1]) if positions[row, i] == 0), positions.shape[1]]
        for begin, end in itertools.pairwise(starts):
            part = slice(begin, end)
            made[row : row + 1, :, part] = math_attention(
                *(heads[row : row + 1, :, part] for heads in (query, key, value)), causal, scale=scale
            )
    return made


def heads(
    generator: torch.Generator, rows: int, length: int, dtype: torch.dtype = torch.float64, narrow: int = 0
) -> list[Tensor]:
    """Queries of 4 heads, keys and values of 2, width 8; values narrower by `narrow`."""
    shapes = ((4, 8), (2, 8), (2, 8 - narrow))
    return [
        torch.randn(rows, count, length, width, generator=generator, dtype=dtype).requires_grad_() for count, width in shapes
    ]


documents = st.lists(st.lists(st.integers(1, 60), min_size=0, max_size=12), min_size=1, max_size=3)


# --- masks


@settings(max_examples=15, deadline=None)
@given(documents, st.integers(1, 3 * BLOCK + 5), st.booleans())
def test_a_mask_of_blocks_is_the_one_that_torch_makes_from_every_pair(rows: list[list[int]], length: int, causal: bool) -> None:
    positions = positions_of(rows, length)
    made = block_mask(positions, causal, positions)
    wanted = document_mask(positions, causal)
    b, i, j = torch.arange(len(positions))[:, None, None], torch.arange(length)[:, None], torch.arange(length)
    assert torch.equal(made.mask_mod(b, torch.tensor(0), i, j), wanted[:, 0])
    torchs = create_block_mask(made.mask_mod, len(positions), None, length, length, device="cpu")
    assert torch.equal(made.to_dense(), torchs.to_dense())
    for counts in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(made, counts), getattr(torchs, counts)), counts
    for counts, listed in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        there = torch.arange(getattr(made, listed).shape[-1]) < getattr(made, counts)[..., None]
        assert torch.equal(getattr(made, listed)[there], getattr(torchs, listed)[there]), listed


@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_one_document_share_a_mask_that_training_can_use_after_validation(causal: bool) -> None:
    ids = torch.zeros(2, 200)
    with torch.inference_mode():
        made = block_mask(None, causal, ids)
    assert made is block_mask(None, causal, ids)
    assert not made.kv_num_blocks.is_inference()
    pairs = torch.ones(200, 200, dtype=torch.bool)
    torchs = create_block_mask(made.mask_mod, 1, None, 200, 200, device="cpu")
    assert torch.equal(made.to_dense(), torchs.to_dense())
    query, key, value = heads(torch.Generator().manual_seed(0), 2, 200)
    mask = (pairs.tril() if causal else pairs)[None, None]
    assert torch.allclose(
        flex.attend(query, key, value, causal, made), math_attention(query, key, value, causal, mask), atol=1e-6
    )


@settings(max_examples=30, deadline=None)
@given(documents, st.integers(1, 40), st.booleans(), st.integers(0, 2**20))
def test_bounds_lay_documents_end_to_end(rows: list[list[int]], length: int, causal: bool, seed: int) -> None:
    """Positions -> bounds -> line -> plain attention per document -> rows, against the dense mask and a softmax per document."""
    positions = positions_of(rows, length)
    made = lengths(positions, causal, positions)
    assert made is not None and made.longest == length and made.bounds.dtype == torch.int32
    assert (len(made.bounds) - 1).bit_count() == 1, "rounded to a power of two, so that few shapes are compiled"
    assert made.bounds[0] == 0 and made.bounds[-1] == positions.numel() and bool((made.bounds.diff() >= 0).all())
    query, key, value = heads(torch.Generator().manual_seed(seed), len(positions), length, narrow=2)
    mixed = stand_in_varlen(
        *map(flash.as_line, (query, key, value)), made.bounds, made.bounds, made.longest, made.longest, causal=causal
    )
    found = flash.as_rows(mixed, query)
    assert torch.allclose(found, per_document(query, key, value, positions, causal))
    masked = math_attention(query, key, value, causal, document_mask(positions, causal))
    assert torch.allclose(found, masked, atol=1e-6), "the same sums in another order; the softmax is float32"


def stand_in_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    softmax_scale: float | None = None, causal: bool = False,
) -> Tensor:  # fmt: skip
    """A stand-in with the words of flash_attn_varlen_func: T H D, plain attention per document."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and int(cu_seqlens_q.diff().max()) <= max_seqlen_q == max_seqlen_k
    parts = []
    for begin, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        if end > begin:
            one = [tensor[begin:end].transpose(0, 1)[None] for tensor in (q, k, v)]
            parts.append(math_attention(*one, causal, scale=softmax_scale)[0].transpose(0, 1))
    return torch.cat(parts)


def stand_in_rows(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False) -> Tensor:
    """A stand-in with the words of flash_attn_func: B T H D."""
    return math_attention(*(tensor.transpose(1, 2) for tensor in (q, k, v)), causal, scale=softmax_scale).transpose(1, 2)


# --- flex


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("narrow", [0, 3])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_flex_is_attention_with_its_gradients(causal: bool, packed: bool, narrow: int, scale: float | None) -> None:
    positions = positions_of([[5, 130, 7], [300]], 290) if packed else None
    ids = torch.zeros(2, 290)
    query, key, value = inputs = heads(torch.Generator().manual_seed(1), 2, 290, narrow=narrow)
    dense = document_mask(positions, causal) if positions is not None else None
    wanted = math_attention(query, key, value, causal, dense, scale)
    found = flex.attend(query, key, value, causal, block_mask(positions, causal, ids), scale)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2), dtype=wanted.dtype)
    assert torch.allclose(found, wanted, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, weights), torch.autograd.grad(wanted, inputs, weights), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_flex_without_blocks_is_the_attention_behind_a_cache() -> None:
    query, key, value = heads(torch.Generator().manual_seed(3), 2, 9)
    few = query[:, :, -2:]
    assert torch.allclose(flex.attend(few, key, value, True), math_attention(few, key, value, True), atol=1e-6)
    mask = document_mask(positions_of([[3], [4, 2]], 9), True)
    assert torch.allclose(flex.attend(query, key, value, True, mask), math_attention(query, key, value, True, mask), atol=1e-6)


def test_widths_of_one_call_are_made_one_as_autocast_would() -> None:
    query, key, value = (torch.randn(1, 1, 2, 8, dtype=dtype) for dtype in (torch.float32, torch.float32, torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {tensor.dtype for tensor in flex.in_one_dtype(query, key, value)} == {torch.bfloat16}
    assert {tensor.dtype for tensor in flex.in_one_dtype(query, key, value)} == {torch.float32}


def packed_batches(seed: int = 0) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Endless batches whose rows hold several documents, cut elsewhere in every batch."""
    generator, number = torch.Generator().manual_seed(seed), 0
    while True:
        number += 1
        ids = torch.randint(0, ROWS, (BATCH, LENGTH + 1), generator=generator)
        cuts = torch.randint(2, LENGTH // 2, (BATCH, 2), generator=generator).tolist()
        yield {"input_ids": ids, "positions": positions_of(cuts, LENGTH + 1)}, number


@pytest.mark.parametrize("family", ["modern", "gpt2", "llama", "deepseek"])
def test_packed_documents_train_alike_by_mask_by_blocks_and_by_bounds(family: str) -> None:
    """Three forms of one mask, natively and through transformers; bounds go to the plain stand-in."""
    recipe, losses = recipe_of(family), {}
    for form, function in {"dense": math_attention, "blocks": flex.attend, "lengths": by_bounds}.items():
        with engine_of(recipe, plan_of(recipe), packed_batches()) as engine:
            undo = engine.family.set_attention(engine.bare, function, form)
            losses[form] = steps(engine, 2)
            undo()
    for form in ("blocks", "lengths"):
        assert losses[form] == pytest.approx(losses["dense"], rel=1e-5), form
    with engine_of(recipe, plan_of(recipe)) as engine:  # and rows of one document each are something else
        assert steps(engine, 2) != pytest.approx(losses["dense"], rel=1e-5)


def by_bounds(query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Any = None, scale: float | None = None) -> Tensor:
    """A stand-in for a function over documents, with the port's words."""
    assert isinstance(mask, Documents)
    line = stand_in_varlen(
        *map(flash.as_line, (query, key, value)), mask.bounds, mask.bounds, mask.longest, mask.longest, scale, causal
    )
    return flash.as_rows(line, query)


def test_a_model_that_hides_tokens_by_windows_or_padding_refuses_bounds() -> None:
    from tests.support.engines import FAMILIES_UNDER_TEST, config_folder

    windowed = {**FAMILIES_UNDER_TEST["llama"], "config": config_folder("mistral"), "vocab_size": ROWS}
    recipe = recipe_of("llama", model=windowed)
    with engine_of(recipe, plan_of(recipe), packed_batches()) as engine:
        engine.family.set_attention(engine.bare, by_bounds, "lengths")
        with pytest.raises(LayerError, match="has a sliding window of 8 tokens"):
            steps(engine, 1)
    losses: list[Any] = []
    for function, form in ((math_attention, "dense"), (flex.attend, "blocks")):
        with engine_of(recipe, plan_of(recipe), packed_batches()) as engine:
            engine.family.set_attention(engine.bare, function, form)
            losses.append(steps(engine, 2))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    reader = recipe_of("bert")
    with engine_of(reader, plan_of(reader)) as engine:
        engine.family.set_attention(engine.bare, by_bounds, "lengths")
        with pytest.raises(LayerError, match="document offsets cannot express"):
            steps(engine, 1)


@pytest.mark.parametrize("family", ["modern", "llama"])
def test_compiled_blocks_share_one_graph_whatever_the_documents(family: str) -> None:
    """With the operator's unfused form, which Dynamo treats as it does the kernel: three blocks, three batches, one graph."""
    from torch._dynamo.utils import counters

    def unfused(
        query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Any = None, scale: float | None = None
    ) -> Tensor:
        return flex.unfused(*flex.in_one_dtype(query, key, value), mask, scale)

    recipe = recipe_of(family)
    with engine_of(recipe, plan_of(recipe), packed_batches()) as engine:
        wanted = steps(engine, 3)
    with engine_of(recipe, plan_of(recipe), packed_batches()) as engine:
        engine.family.set_attention(engine.bare, unfused, "blocks")
        torch._dynamo.reset()
        counters.clear()
        for block in engine.blocks.values():
            block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        assert steps(engine, 3) == pytest.approx(wanted, rel=1e-5)
        assert counters["stats"]["unique_graphs"] == 1


def test_flex_in_a_compiled_graph_on_a_cpu_says_what_to_type() -> None:
    with pytest.raises(PlanError, match=r"no backward of compiled flex_attention on a CPU \(--layer.compile eager\)"):
        plan_of(recipe_of("modern"), {"attention": "flex", "compile": "compile-blocks"})


def test_blocks_that_somebody_else_compiled_are_told_before_torch_fails() -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, {"attention": "flex"})) as engine:
        engine.bare.blocks[0].compile(backend="aot_eager")
        with pytest.raises(LayerError, match="attention=flex: torch has no backward of compiled flex_attention on a CPU"):
            steps(engine, 1)


@pytest.mark.parametrize("other", [math_attention, sdpa.attend])
def test_one_block_with_another_attention_is_noticed(other: Any) -> None:
    recipe, layer = recipe_of("modern"), CATALOG["flex"]
    with engine_of(recipe, plan_of(recipe, {"attention": "flex"})) as engine:
        engine.bare.blocks[1].attention.attend = lambda q, k, v, causal, mask=None: other(q, k, v, causal)
        proof = layer.verify(engine, watched(engine), {})
    assert proof.status is Status.INACTIVE and proof.text.startswith("2 flex_attention unfused operators in 3 block forwards")


def test_what_flex_proves_on_a_cpu_says_in_which_form() -> None:
    recipe = recipe_of("llada")
    with engine_of(recipe, plan_of(recipe, {"attention": "flex", "microbatch": "fixed", "microbatch.sequences": 2})) as engine:
        proof = CATALOG["flex"].verify(engine, watched(engine), {})
    assert proof.status is Status.ACTIVE and "6 flex_attention unfused operators in 6 block forwards" in proof.text


# --- torch's own, held to a backend


def backend(engine: Engine, name: str) -> dict[str, Any]:
    return CATALOG["sdpa"].read_options({"backend": name}, "the test")


def test_a_backend_is_held_proven_and_let_go() -> None:
    recipe, options = recipe_of("modern"), {"attention": "sdpa", "attention.backend": "flash"}
    switches = [
        getattr(torch.backends.cuda, name) for name in ("flash_sdp_enabled", "mem_efficient_sdp_enabled", "math_sdp_enabled")
    ]
    before = [switch() for switch in switches]
    with engine_of(recipe, plan_of(recipe, options)) as engine:
        trace = watched(engine)
        assert [switch() for switch in switches] == before
        proof = CATALOG["sdpa"].verify(engine, trace, backend(engine, "flash"))
        assert proof.status is Status.ACTIVE and proof.text == "3 flash in 3 block forwards"
        asked = CATALOG["sdpa"].verify(engine, trace, backend(engine, "cudnn"))
        assert asked.status is Status.INACTIVE and asked.text == "requested cudnn, torch ran 3 flash in 3 block forwards"
    assert not engine._contexts["forward_context"]


def test_a_held_backend_is_one_graph_too(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_quickly(monkeypatch)
    recipe = recipe_of("modern")
    plan = plan_of(recipe, {"attention": "sdpa", "attention.backend": "flash", "compile": "compile-blocks"})
    torch._dynamo.reset()
    with engine_of(recipe, plan) as engine:
        trace = watched(engine)
        assert CATALOG["sdpa"].verify(engine, trace, backend(engine, "flash")).status is Status.ACTIVE
        assert CATALOG["compile-blocks"].verify(engine, trace, {}).status is Status.ACTIVE


@pytest.mark.parametrize("name", ["efficient", "cudnn"])
def test_a_backend_that_cannot_run_here_is_refused_and_told(name: str) -> None:
    recipe = recipe_of("modern")
    with pytest.raises(PlanError, match=f"torch has no {name} attention for a CPU"):
        plan_of(recipe, {"attention": "sdpa", "attention.backend": name})
    with (
        engine_of(recipe, plan_of(recipe)) as engine,
        CATALOG["sdpa"].apply(engine, backend(engine, name)),
        pytest.raises(LayerError, match=f"torch's {name} attention does not support this dtype, head width or mask"),
    ):
        steps(engine, 1)


def test_another_runtime_error_is_passed_on_as_it_is() -> None:
    recipe = recipe_of("modern")
    with (
        engine_of(recipe, plan_of(recipe)) as engine,
        CATALOG["sdpa"].apply(engine, backend(engine, "flash")),
        pytest.raises(RuntimeError, match="something else"),
        engine.forward_context(),
    ):
        raise RuntimeError("something else")


# --- needs


def reasons(
    layer: str,
    box: str,
    packages: dict[str, str] | None = None,
    family: str = "modern",
    kind: Kind = Kind.UNSUPPORTED,
    **more: Any,
) -> str:
    """What speaks against a layer on a fake machine, in one text."""
    given = machine.read(MACHINES / f"{box}.json")
    given = replace(given, packages={**given.packages, **(packages or {})})
    options = more.pop("options", {})
    recipe = recipe_of(family, **more)
    case = Case(given, spec_for(recipe), recipe, World())
    unmet = CATALOG[layer].rejections(case, CATALOG[layer].read_options(options, "the test"))
    return " | ".join(str(reason) for reason in unmet if reason.kind is kind)


CHAT = {"data": {"sequence_length": LENGTH, "tokenizer": "chars", "format": "chat"}}
TEXT: dict[str, Any] = {}
FA = {"flash-attn": "2.8.3", "flash-attn-3": "3.0.0", "flash-attn-4": "4.0.0b36", "triton": "3.7"}


@pytest.mark.parametrize(
    ("layer", "box", "packages", "model", "more", "wanted"),
    [
        ("flex", "t4", FA, "modern", TEXT, "needs compute capability 8.0, found 7.5"),
        ("varlen", "t4", {}, "modern", CHAT, "needs compute capability 8.0, found 7.5"),
        ("varlen", "cpu", {}, "modern", CHAT, "needs an NVIDIA GPU, found none"),
        ("varlen", "h100", {}, "bert", TEXT, "masks padding"),
        ("varlen", "h100", {}, "modern", CHAT, ""),
        ("fa2", "rtx3090", {}, "modern", CHAT, "needs the package flash-attn, not installed (pip install 'gptoughts[flash]')"),
        ("fa2", "t4", FA, "modern", CHAT, "needs compute capability 8.0"),
        ("fa2", "h100", FA, "bert", TEXT, "which FlashAttention does not support"),
        ("fa2", "rtx3090", FA, "modern", CHAT, ""),
        ("fa3", "h100", {}, "modern", TEXT, "needs one of the packages flash-attn-3, tokenspeed-fa3, none is installed"),
        ("fa3", "h100", {"tokenspeed-fa3": "3.0.0.post20260810"}, "modern", TEXT, "is built without the backward, for serving"),
        ("fa3", "h100", FA, "modern", TEXT, ""),
        ("fa3", "b200x8", FA, "modern", TEXT, "needs compute capability 9.x, found 10.0"),
        ("fa3", "a100x8-80gb", FA, "modern", TEXT, "needs compute capability 9.0, found 8.0"),
        ("fa4", "h100", {}, "modern", TEXT, "needs the package flash-attn-4"),
        ("fa4", "b200x8", FA, "modern", TEXT, ""),
        ("fa4", "rtx4090", FA, "modern", TEXT, "needs compute capability 9.0, found 8.9"),
    ],
)  # fmt: skip
def test_needs_on_fake_machines(
    layer: str, box: str, packages: dict[str, str], model: str, more: dict[str, Any], wanted: str
) -> None:
    found = reasons(layer, box, packages, model, **more)
    assert wanted in found if wanted else not found, found


@pytest.mark.parametrize(
    ("options", "box", "more", "wanted"),
    [
        ({"backend": "flash"}, "t4", TEXT, "backend flash needs compute capability 8.0, found 7.5"),
        ({"backend": "efficient"}, "t4", TEXT, ""),
        ({"backend": "flash"}, "h100", CHAT, "backend flash takes no mask, and these rows need one"),
        ({"backend": "cudnn"}, "h100", TEXT, ""),
        ({}, "t4", CHAT, ""),
    ],
)
def test_backends_on_fake_machines(options: dict[str, str], box: str, more: dict[str, Any], wanted: str) -> None:
    found = reasons("sdpa", box, options=options, **more)
    assert wanted in found if wanted else not found, found


@pytest.mark.parametrize("layer", ["flex", "varlen"])
def test_layers_for_documents_do_not_pay_without_them(layer: str) -> None:
    assert "no documents share a row" in reasons(layer, "h100", FA, kind=Kind.SLOWER)
    assert not reasons(layer, "h100", FA, kind=Kind.SLOWER, **CHAT)


def test_wide_heads_are_refused_by_flash_attention() -> None:
    wide = {"model": {"depth": 1, "width": 640, "heads": 2, "vocab_size": ROWS}}
    assert "heads of at most 256" in reasons("varlen", "h100", **wide)
    assert "needs heads of at most 256 and a multiple of 8, the model has 320" in reasons("fa2", "h100", FA, **wide)
    middle = {"model": {"depth": 1, "width": 320, "heads": 2, "vocab_size": ROWS}}
    assert "its Blackwell kernels take heads of at most 128" in reasons("fa4", "b200x8", FA, **middle)
    assert not reasons("fa4", "h100", FA, **middle)


# --- the packages


PACKAGES = {"fa2": "flash_attn", "fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}


def put_stand_in(monkeypatch: pytest.MonkeyPatch, version: str, tuples: bool) -> None:
    """A module of the package's name whose functions are plain: a stand-in for layouts and words."""

    def given(function: Any) -> Any:
        return lambda *a, **k: (function(*a, **k), None) if tuples else function(*a, **k)

    name = PACKAGES[version]
    for part in (name.split(".")[0], name):
        module = types.ModuleType(part)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, part, module)
    sys.modules[name].flash_attn_func = given(stand_in_rows)  # type: ignore[attr-defined]
    sys.modules[name].flash_attn_varlen_func = given(stand_in_varlen)  # type: ignore[attr-defined]


@pytest.mark.parametrize("tuples", [False, True])
@pytest.mark.parametrize("version", list(PACKAGES))
def test_packages_get_their_own_layout_and_words(version: Any, tuples: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    put_stand_in(monkeypatch, version, tuples)
    attend = flash.attention(version)
    query, key, value = heads(torch.Generator().manual_seed(5), 2, 20, torch.bfloat16, narrow=2)
    positions = positions_of([[3, 9], [20]], 20)
    assert torch.allclose(attend(query, key, value, True, None, 0.2), math_attention(query, key, value, True, None, 0.2))
    wanted = per_document(query, key, value, positions, True, 0.2)
    assert torch.allclose(attend(query, key, value, True, lengths(positions, True, positions), 0.2), wanted, atol=1e-2)
    with pytest.raises(LayerError, match=f"{version}: needs half precision. Found torch.float32"):
        attend(query.float(), key.float(), value.float(), True)
    with pytest.raises(LayerError, match="takes document offsets, not a mask"):
        attend(query, key, value, True, document_mask(positions, True))


@pytest.mark.parametrize("name", ["fa2", "fa3", "fa4", "varlen"])
def test_layers_are_put_in_place_and_taken_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package: the surgery, a step in bf16, and the undo."""
    if name == "varlen":
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torchs_first_varlen)
    else:
        put_stand_in(monkeypatch, name, tuples=False)
    recipe = recipe_of("llama" if name == "fa3" else "modern")
    with engine_of(recipe, plan_of(recipe, {"precision": "bf16"}), packed_batches()) as engine:
        before = [getattr(module, "attend", None) for module in engine.bare.modules()]
        with CATALOG[name].apply(engine, {}):
            proof = CATALOG[name].verify(engine, watched(engine, 0), {})
            assert proof.status is Status.INACTIVE, "no kernel of its ran"
        assert [getattr(module, "attend", None) for module in engine.bare.modules()] == before


def torchs_first_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
) -> Tensor:
    """A stand-in with the words that varlen_attn had first: no scale, no groups."""
    assert query.shape[1] == key.shape[1]
    return stand_in_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, None, is_causal)


def torchs_later_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """A stand-in with the words of torch 2.13."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    return stand_in_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size == (-1, 0))


@pytest.mark.parametrize("function", [torchs_first_varlen, torchs_later_varlen])
@pytest.mark.parametrize("causal", [True, False])
def test_torchs_varlen_gets_the_words_of_its_version(function: Any, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    attend = flash.torch_varlen()
    query, key, value = heads(torch.Generator().manual_seed(6), 2, 20, torch.bfloat16, narrow=2)
    positions = positions_of([[3, 9], [20]], 20)
    wanted = per_document(query, key, value, positions, causal, 0.2)
    assert torch.allclose(attend(query, key, value, causal, lengths(positions, causal, positions), 0.2), wanted, atol=3e-2)
    few = query[:, :, -3:]
    assert torch.allclose(attend(few, key, value, causal), math_attention(few, key, value, causal), atol=3e-2)


def test_torch_before_varlen_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    with pytest.raises(LayerError, match=re.escape("attention=varlen: needs torch 2.10. Found")):
        flash.torch_varlen()


@pytest.mark.parametrize(
    ("version", "files", "wanted"),
    [
        ("fa2", {"flash_attn/__init__.py": "raise OSError('libcudart.so.12: cannot open shared object file')"},
         "attention=fa2: installed, but the import fails: OSError: libcudart.so.12: cannot open shared object file"),
        ("fa3", {"flash_attn_interface.py": "import flash_attn_3_c_that_is_not_there"},
         "attention=fa3: installed, but the import fails: ModuleNotFoundError: No module named 'flash_attn_3_c_that_is_not_there'"),
        ("fa4", {"flash_attn/cute/__init__.py": "raise RuntimeError('cutlass: driver too old')"},
         "attention=fa4: installed, but the import fails: RuntimeError: cutlass: driver too old"),
        ("fa3", {"flash_attn_interface.py": "flash_attn_func = flash_attn_varlen_func = None",
                 "flash_attn_config.py": "CONFIG = {'build_flags': {'FLASHATTENTION_DISABLE_BACKWARD': True}}"},
         "attention=fa3: inference-only build without backward"),
    ],
)  # fmt: skip
def test_a_broken_package_is_quoted(version: str, files: dict[str, str], wanted: str, tmp_path: Path) -> None:
    """A real module that raises, in a process of its own."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n", encoding="utf-8")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from gptoughts.errors import LayerError\nfrom gptoughts.models.gpt import flash\n"
        f"try:\n    flash.attention({version!r})\nexcept LayerError as error:\n    print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and wanted in ran.stdout, ran.stderr[-2000:] + ran.stdout


# --- proofs by the names of kernels


def seen(*kinds: str, blocks: int | None = None) -> StepTrace:
    """A sight made of one block's trace per kind, as `prove` reads it."""
    steps = json.loads((TRACES / "attention-kernels.json").read_text(encoding="utf-8"))["steps"]
    trace = step_trace.ProfilerTotals()
    for kind in kinds:
        step_trace.add_events([_event(event) for event in steps[kind]["traceEvents"]], trace)
    return StepTrace(
        operators={name: Operator(name, calls, dict(trace.dtypes[name])) for name, calls in trace.calls.items()},
        kernels=dict(trace.kernels), regions=trace.regions, micro_batches=1, blocks=blocks or len(kinds), updated=True,
        weights_moved=True, step_seconds=1.0, data_wait_seconds=0.0,
    )  # fmt: skip


def _event(event: dict[str, Any]) -> Any:
    kinds, on_gpu = torch.autograd.DeviceType, event["cat"] == "kernel"
    start, length = int(event["ts"] * 1000), int(event["dur"] * 1000)
    return SimpleNamespace(
        name=lambda: event["name"],
        device_type=lambda: kinds.CUDA if on_gpu else kinds.CPU,
        device_resource_id=lambda: event["tid"],
        start_ns=lambda: start,
        duration_ns=lambda: length,
        start_thread_id=lambda: event["tid"],
        dtypes=list,
        nbytes=lambda: 0,
    )


CUDA = SimpleNamespace(device=SimpleNamespace(type="cuda"))


def verdict(layer: str, trace: StepTrace, **options: str) -> Any:
    return CATALOG[layer].verify(CUDA, trace, CATALOG[layer].read_options(options, "the test"))


@pytest.mark.parametrize("kind", ["flex", "varlen", "fa2", "fa3", "fa4", "flash", "efficient", "cudnn"])
def test_every_implementation_is_told_by_its_kernels_and_by_no_other(kind: str) -> None:
    options = {"backend": kind} if kind in ("flash", "efficient", "cudnn") else {}
    layer = "sdpa" if options else kind
    assert verdict(layer, seen(kind, kind, kind), **options).status is Status.ACTIVE
    assert verdict(layer, seen(kind, kind, blocks=3), **options).status is Status.INACTIVE, "a block without it"
    for other in ("flex", "varlen", "fa2", "fa3", "fa4", "flash", "efficient", "cudnn"):
        if other != kind and {kind, other} != {"flash", "varlen"}:
            proof = verdict(layer, seen(kind, kind, other), **options)
            assert proof.status is Status.INACTIVE, (kind, other, proof.text)


def test_a_dense_mask_that_sends_flash_elsewhere_is_seen() -> None:
    proof = verdict("sdpa", seen("efficient", "efficient"), backend="flash")
    assert proof.status is Status.INACTIVE
    assert proof.text == "requested flash, torch ran 2 efficient in 2 block forwards; kernels: 2 efficient"
    free = verdict("sdpa", seen("flash", "efficient"))
    assert (
        free.status is Status.ACTIVE and free.text == "1 efficient, 1 flash in 2 block forwards; kernels: 1 efficient, 1 flash"
    )


def test_torch_told_to_run_a_newer_kernel_under_the_name_of_flash_is_flash_and_named() -> None:
    both = replace(seen("flash", "flash"), kernels=seen("fa3", "fa3").kernels)
    proof = verdict("sdpa", both, backend="flash")
    assert proof.status is Status.ACTIVE and proof.text.endswith("kernels: 2 fa3")


def test_operators_without_their_kernels_prove_nothing() -> None:
    assert verdict("sdpa", replace(seen("flash", "flash"), kernels={"gemm": 4}), backend="flash").status is Status.UNPROVEN
    assert verdict("varlen", replace(seen("varlen", "varlen"), kernels={"gemm": 4})).status is Status.UNPROVEN
    efficient = replace(seen("varlen", "varlen"), kernels=seen("efficient", "efficient").kernels)
    assert verdict("varlen", efficient).status is Status.INACTIVE


@pytest.mark.parametrize("layer", LAYERS)
def test_the_old_kernel_is_noticed(layer: str) -> None:
    written_out = StepTrace(
        {"aten::_softmax": Operator("aten::_softmax", 6)}, {"softmax_warp_forward": 6}, 0, 1, 3, True, True, 1.0, 0.0
    )
    proof = verdict(layer, written_out)
    assert proof.status is Status.INACTIVE and "3 block forwards" in proof.text
