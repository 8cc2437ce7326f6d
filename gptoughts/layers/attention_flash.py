"""FlashAttention 2, 3 and 4 from their own packages: one layer each, with its own card, requirements and kernel names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from gptoughts.config.tasks import task_of
from gptoughts.layers.support.requirements import HALF_PRECISION, VARIABLE_LENGTH_CLASHES, fixed_attention
from gptoughts.planning.kernel_names import attention_forwards, format_launches
from gptoughts.planning.layer import (
    Case,
    Engine,
    Evidence,
    Layer,
    Options,
    Reason,
    StepTrace,
    active,
    inactive,
    slower,
    unproven,
    unsupported,
)

FA2_CARD = """FlashAttention-2 from its own package: torch's fused attention, plus packed documents without a mask.

`sdpa` contains the same kernels, so rows of one document gain nothing; where documents share rows, `sdpa` falls back to a slower kernel
with a dense mask and this layer does not. It hurts on Hopper, where it reaches about a third of the peak. Without a matching wheel the
package takes an hour to compile. Compiled blocks stay one graph: the package registers its operators with torch.
Sources: Dao 2023 (arXiv:2307.08691); Shah et al. 2024 (arXiv:2407.08608), 35 % of an H100's peak.
"""
FA3_CARD = """FlashAttention-3 for Hopper: asynchronous copies and matmuls, up to twice as fast as FlashAttention-2.

A whole training step gains less than the kernel: nanochat measured 9 % more tokens per second. Packed documents need no mask. Compiled
blocks stay one graph, because the package registers its operators with torch. It needs compute capability 9.x. Serving builds have no
backward and are refused by version. The alternative to measure is torch's cuDNN attention (`sdpa`, backend = "cudnn").
Sources: Shah et al. 2024 (arXiv:2407.08608), 1.5 to 2.0 times; karpathy/nanochat, dev/LOG.md.
"""
FA4_CARD = """FlashAttention-4, written in the CuTe Python DSL for Hopper and Blackwell: fused attention for Blackwell.

Packed documents need no mask. Its kernels are compiled on first call, and the package is a pre-release. It hurts where blocks are
compiled: its functions are not torch.compile operators, so blocks run eagerly, which usually costs more than attention gains.
Source: Dao-AILab/flash-attention, flash_attn/cute (flash-attn-4 4.0.0b36: architectures, head widths, no operators of torch.library).
"""

WIDEST_HEAD, HEAD_MULTIPLE = 256, 8
FA3_PACKAGES = ("flash-attn-3", "tokenspeed-fa3")
"""Distributions that contain the module flash_attn_interface; one is enough."""
FA3_SERVING_ONLY = ("3.0.0.post20251110", "3.0.0.post20260408", "3.0.0.post20260810")
"""Wheels of tokenspeed-fa3 whose flash_attn_config.py says FLASHATTENTION_DISABLE_BACKWARD; `apply` checks every build again."""
FA3_BUILD = "pip install --no-build-isolation 'git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'"
BLACKWELL = ((10, 0), (12, 0))
BLACKWELL_WIDEST = 128
BLACKWELL_MORE = (192, 256)
"""Head widths above 128 that the Blackwell kernels take: DeepSeek's 192 with values of 128, and 256."""
OPAQUE = "FlashAttention-4's functions are not torch.compile operators, and fullgraph=True is used"


def _limits(case: Case) -> Iterator[Reason]:
    """Require a known family, no padding masks, and heads of at most 256 and a multiple of 8."""
    spec = case.spec
    fixed = list(fixed_attention(case))
    yield from fixed
    if fixed:
        return
    if task_of(case.recipe).head != "causal":
        yield unsupported("question answering masks padding, which FlashAttention does not support")
    if spec.head_dim is not None and (spec.head_dim > WIDEST_HEAD or spec.head_dim % HEAD_MULTIPLE):
        yield unsupported(
            f"needs heads of at most {WIDEST_HEAD} and a multiple of {HEAD_MULTIPLE}, the model has {spec.head_dim}"
        )


def fa2_unmet(case: Case, options: Options) -> Iterator[Reason]:
    """FlashAttention's limits; faster than sdpa only where documents share rows, on GPUs before Hopper."""
    yield from _limits(case)
    least, data = case.machine.min_capability(), case.recipe.data
    if least is not None and least >= (9, 0):
        yield slower("from compute capability 9.0 on it leaves most of the GPU idle", "Shah et al. 2024: 35 % of an H100")
    elif data.format != "chat" or not data.packing:
        yield slower("no documents share a row: sdpa has the same kernels", "torch.nn.attention: FlashAttention-2 inside")


def fa3_unmet(case: Case, options: Options) -> Iterator[Reason]:
    """FlashAttention's limits, a Hopper GPU, and a package with a backward."""
    yield from _limits(case)
    capabilities = sorted({gpu.compute_capability for gpu in case.machine.gpus if gpu.compute_capability is not None})
    if any(capability[0] != 9 for capability in capabilities):
        found = ", ".join(f"{major}.{minor}" for major, minor in capabilities)
        yield unsupported(f"needs compute capability 9.x, found {found}")
        return
    packages = case.machine.packages
    if not any(package in packages for package in FA3_PACKAGES):
        yield unsupported(f"needs one of the packages {', '.join(FA3_PACKAGES)}, none is installed", remedy=FA3_BUILD)
    elif "flash-attn-3" not in packages and packages["tokenspeed-fa3"] in FA3_SERVING_ONLY:
        yield unsupported(
            f"tokenspeed-fa3 {packages['tokenspeed-fa3']} is built without the backward, for serving", remedy=FA3_BUILD
        )


def fa4_unmet(case: Case, options: Options) -> Iterator[Reason]:
    """FlashAttention's limits, and the architectures and head widths of its backward."""
    yield from _limits(case)
    least, head = case.machine.min_capability(), case.spec.head_dim
    if least is not None and least >= (13, 0):
        yield unsupported(f"its backward supports compute capability 9.x to 12.x, found {least[0]}.{least[1]}")
    on_blackwell = least is not None and BLACKWELL[0] <= least < BLACKWELL[1]
    if on_blackwell and head is not None and head > BLACKWELL_WIDEST and head not in BLACKWELL_MORE:
        yield unsupported(
            f"its Blackwell kernels take heads of at most {BLACKWELL_WIDEST}, or 192 or 256, the model has {head}"
        )


@contextmanager
def _apply(version: Literal["fa2", "fa3", "fa4"], engine: Engine, options: Options) -> Iterator[None]:
    """Set the package's functions on every attention module, and count documents per forward."""
    from gptoughts.models.gpt import flash

    undo = engine.family.set_attention(engine.bare, flash.attention(version), "lengths")
    try:
        yield
    finally:
        undo()


def _verify(version: str, engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require one forward kernel of `version` per block and micro-batch, and none of another implementation."""
    wanted, ran = trace.attention_forwards, attention_forwards(trace)
    mine, others = ran.get(version, 0), {kind: count for kind, count in ran.items() if kind != version}
    if mine < wanted or others:
        return inactive(
            f"{format_launches(ran)} kernels in {trace.attention_label}, requested {version}", ran=mine, expected=wanted
        )
    if not wanted:
        return unproven("the model has no attention modules to count")
    return active(f"{mine} {version} kernels in {trace.attention_label}", ran=mine, expected=wanted)


def _flash(
    version: Literal["fa2", "fa3", "fa4"], card: str, unmet: Callable[[Case, Options], Iterator[Reason]], **more: Any
) -> Layer:
    return Layer(
        name=version,
        slot="attention",
        card=card,
        apply=partial(_apply, version),
        verify=partial(_verify, version),
        memory=lambda case, options, budget: budget.without_scores(),
        unmet=unmet,
        needs_slots={"precision": HALF_PRECISION},
        changes_numerics=True,
        repeatable_on_gpu=False,
        **more,
    )


FA2 = _flash(
    "fa2",
    FA2_CARD,
    fa2_unmet,
    packages=(("flash-attn", "flash"),),
    min_capability=(8, 0),
    clashes=VARIABLE_LENGTH_CLASHES,
)
FA3 = _flash("fa3", FA3_CARD, fa3_unmet, min_capability=(9, 0), clashes=VARIABLE_LENGTH_CLASHES)
FA4 = _flash(
    "fa4",
    FA4_CARD,
    fa4_unmet,
    packages=(("flash-attn-4", "flash-4"),),
    min_capability=(9, 0),
    clashes={"compile-blocks": OPAQUE, "compile-model": OPAQUE, "cuda-graph": OPAQUE},
)
