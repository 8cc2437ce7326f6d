"""What the proofs say of kernels that no CPU runs, on sights as a GPU's profiler would give them: names recorded in the layers' own files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptoughts.layers import CATALOG
from gptoughts.planning.evidence import Operator, Status, StepTrace

CUDA = SimpleNamespace(type="cuda")


def trace(**more: Any) -> StepTrace:
    seen: dict[str, Any] = {
        "operators": {}, "kernels": {"some_kernel": 1}, "regions": 0, "micro_batches": 2, "blocks": 3, "updated": True,
        "weights_moved": True, "step_seconds": 1.0, "data_wait_seconds": 0.01,
    }  # fmt: skip
    return StepTrace(**{**seen, **more})


def operators(**calls: int) -> dict[str, Operator]:
    return {f"aten::{name}": Operator(f"aten::{name}", count) for name, count in calls.items()}


def verdict(name: str, seen: StepTrace, **engine: Any) -> Status:
    layer = CATALOG[name]
    here = SimpleNamespace(device=CUDA, **engine)
    return layer.verify(here, seen, layer.read_options({}, "the test")).status


BF16, FP32 = "c10::BFloat16", "float"


@pytest.mark.parametrize(
    ("name", "dtypes", "status"),
    [
        ("aten::mm", (BF16, BF16), Status.ACTIVE),
        ("aten::mm", (BF16, BF16, "", FP32), Status.ACTIVE),  # a float32 output of bf16 factors
        ("aten::mm", (FP32, FP32), Status.INACTIVE),
        ("aten::addmm", (FP32, BF16, BF16, "Scalar"), Status.ACTIVE),
        ("aten::addmm_", (FP32, FP32, FP32), Status.INACTIVE),
        ("aten::convolution", (FP32, FP32, ""), Status.INACTIVE),
        ("aten::relu", (FP32,), Status.UNPROVEN),
    ],
)
def test_bf16_looks_at_the_factors(name: str, dtypes: tuple[str, ...], status: Status) -> None:
    assert verdict("bf16", trace(operators={name: Operator(name, 4, {dtypes: 4})})) is status


@pytest.mark.parametrize("backend", ["flash", "efficient", "cudnn"])
def test_sdpa_knows_every_fused_backend(backend: str) -> None:
    forward, backward = f"_scaled_dot_product_{backend}_attention", f"_scaled_dot_product_{backend}_attention_backward"
    assert verdict("sdpa", trace(operators=operators(**{forward: 6, backward: 6}))) is Status.ACTIVE
    assert verdict("sdpa", trace(operators=operators(**{forward: 5, backward: 6}))) is Status.INACTIVE
    fell = operators(**{forward: 6, "_scaled_dot_product_attention_math": 1})
    assert verdict("sdpa", trace(operators=fell)) is Status.INACTIVE
    assert verdict("recompute-blocks", trace(operators=operators(**{forward: 12, backward: 6}))) is Status.ACTIVE
    assert verdict("recompute-blocks", trace(operators=operators(**{forward: 11, backward: 6}))) is Status.INACTIVE


def test_prefetch_wants_a_stream_that_only_copies() -> None:
    reading = SimpleNamespace(served=3)
    assert verdict("prefetch", trace(memcpy_streams=1), batches=reading) is Status.ACTIVE
    assert verdict("prefetch", trace(memcpy_streams=0), batches=reading) is Status.INACTIVE
    assert verdict("prefetch", trace(memcpy_streams=0, kernels={}), batches=reading) is Status.UNPROVEN
    assert verdict("prefetch", trace(memcpy_streams=1), batches=object()) is Status.INACTIVE


def fused_engine(sites: int) -> dict[str, Any]:
    """A converted model of which each site has one projection."""
    site = SimpleNamespace(linears=(None,), at=SimpleNamespace(forward=len))
    return {"extras": {"fp8-te": SimpleNamespace(sites=[site] * sites, total=9, left_out={}, state_dict=dict)}}


def test_fp8_counts_matmuls_and_not_casts() -> None:
    gemm, cast = "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n", "cast_transpose_fused_kernel<__nv_fp8_e4m3>"
    assert verdict("fp8-te", trace(kernels={gemm: 54}), **fused_engine(9)) is Status.ACTIVE
    assert verdict("fp8-te", trace(kernels={gemm: 35}), **fused_engine(9)) is Status.INACTIVE
    assert verdict("fp8-te", trace(kernels={cast: 500}), **fused_engine(9)) is Status.INACTIVE
    assert verdict("fp8-te", trace(kernels={"sm90_gemm_bf16": 500}), **fused_engine(9)) is Status.INACTIVE
    assert verdict("fp8-te", trace(kernels={}), **fused_engine(9)) is Status.UNPROVEN
    assert verdict("fp8-te", trace(kernels={gemm: 54}), extras={}) is Status.INACTIVE


FP8_NAMES = json.loads((Path(__file__).parents[1] / "traces" / "fp8-kernels.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", FP8_NAMES["kernels"], ids=lambda row: row["name"][:60])
def test_kernels_that_multiply_8_bit_matrices_are_told_by_their_names(row: dict[str, Any]) -> None:
    from gptoughts.planning.matmul_dtypes import is_fp8_kernel

    assert is_fp8_kernel(row["name"]) is row["fp8"], row


def test_the_allocators_snapshot_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for segments, status in (([{"is_expandable": True}, {}], Status.ACTIVE), ([{}, {"is_expandable": False}], Status.INACTIVE)):
        monkeypatch.setattr(torch.cuda.memory, "memory_snapshot", lambda segments=segments: segments)
        assert verdict("expandable", trace()) is status


def test_fused_loss_counts_the_watched_step_only() -> None:
    assert verdict("fused-ce", trace(call_counts={"fused-ce": 2})) is Status.ACTIVE
    assert verdict("fused-ce", trace(call_counts={"fused-ce": 1})) is Status.INACTIVE


def test_a_side_stream_is_one_that_ran_no_kernel() -> None:
    from gptoughts.run.step_trace import ProfilerTotals, add_events

    def event(name: str, stream: int) -> Any:
        kind = torch.autograd.DeviceType.CUDA
        return SimpleNamespace(name=lambda: name, device_type=lambda: kind, device_resource_id=lambda: stream)

    totals = ProfilerTotals()
    add_events(
        [
            event("Memcpy HtoD (Pinned -> Device)", 7),
            event("Memset (Device)", 7),
            event("gemm", 20),
            event("Memcpy HtoD (Pageable)", 20),
        ],
        totals,
    )
    assert totals.copy_streams - totals.kernel_streams == {7}
    assert dict(totals.kernels) == {"gemm": 1}


def test_an_operator_that_autocast_sends_on_is_counted_once_with_what_it_computed() -> None:
    """GPT-2's projections in transformers call torch.addmm, which the profiler sees before and after autocast."""
    from types import SimpleNamespace as Engine

    from gptoughts.run import step_trace

    x, weight, bias = torch.randn(4, 8), torch.randn(8, 8), torch.randn(8)

    def product() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.addmm(bias, x, weight)

    with step_trace.profiled(Engine(device=torch.device("cpu"))) as trace:  # type: ignore[arg-type]
        product()
    assert trace.calls["aten::addmm"] == 1
    kept = {dtypes[1:3]: count for dtypes, count in trace.dtypes["aten::addmm"].items() if count}
    assert kept == {("c10::BFloat16", "c10::BFloat16"): 1}
