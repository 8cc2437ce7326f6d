"""The catalog: every layer by name, in the order of slots. Each lives in one file; none imports another."""

from __future__ import annotations

from gptoughts.layer import Layer
from gptoughts.layers import (
    allocator_expandable,
    attention_sdpa,
    baseline,
    compile_blocks,
    host_threads,
    loader_prefetch,
    loss_fused_ce,
    matmul_tf32,
    microbatch_fixed,
    optimizer_fused,
    parallel_ddp,
    precision_bf16,
    precision_fp8_te,
    recompute_blocks,
)

CATALOG: dict[str, Layer] = {
    "system": baseline.SYSTEM,
    "threads": host_threads.LAYER,
    "native": baseline.NATIVE,
    "expandable": allocator_expandable.LAYER,
    "ieee": baseline.IEEE,
    "tf32": matmul_tf32.LAYER,
    "math": baseline.MATH,
    "sdpa": attention_sdpa.LAYER,
    "torch-kernels": baseline.TORCH_KERNELS,
    "fp32": baseline.FP32,
    "bf16": precision_bf16.LAYER,
    "fp8-te": precision_fp8_te.LAYER,
    "full-ce": baseline.FULL_CE,
    "fused-ce": loss_fused_ce.LAYER,
    "keep": baseline.KEEP,
    "recompute-blocks": recompute_blocks.LAYER,
    "resident": baseline.RESIDENT,
    "eager": baseline.EAGER,
    "compile-blocks": compile_blocks.LAYER,
    "single": baseline.SINGLE,
    "ddp": parallel_ddp.LAYER,
    "plain": baseline.PLAIN,
    "fused": optimizer_fused.LAYER,
    "with-weights": baseline.WITH_WEIGHTS,
    "after-clip": baseline.AFTER_CLIP,
    "direct": baseline.DIRECT,
    "prefetch": loader_prefetch.LAYER,
    "whole": baseline.WHOLE,
    "fixed": microbatch_fixed.LAYER,
}
"""Layer name -> layer. A plugin adds to a copy of it."""
