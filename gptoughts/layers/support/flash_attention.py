"""What the FlashAttention packages have in common: what they cannot do, and which kernels prove them. Torch-free, for their layers."""

from __future__ import annotations

from collections.abc import Iterator

from gptoughts.planning.evidence import Evidence, StepTrace, active, inactive, unproven
from gptoughts.planning.kernel_names import attention_forwards, told
from gptoughts.planning.layer import Case, Reason, unsupported

HALF_PRECISION = ("bf16", "fp16", "fp8-te", "fp8-torchao")
"""Layers of the precision slot under which attention computes in half precision."""
WIDEST_HEAD = 256
MULTIPLE = 8


def limits(case: Case) -> Iterator[Reason]:
    """What holds for every version: a family of ours, no padding masks, heads of at most 256 and a multiple of 8."""
    spec = case.spec
    if spec.family is None:
        yield unsupported("needs a model of a known family; a module of your own calls its attention itself")
        return
    if case.recipe.objective == "question-answering":
        yield unsupported("question answering hides padding with masks, which FlashAttention's functions do not take")
    if spec.head_dim is not None and (spec.head_dim > WIDEST_HEAD or spec.head_dim % MULTIPLE):
        yield unsupported(f"needs heads of at most {WIDEST_HEAD} and a multiple of {MULTIPLE}, the model has {spec.head_dim}")


def proof(trace: StepTrace, version: str) -> Evidence:
    """One forward kernel of `version` per block and micro-batch, and of no other implementation."""
    wanted, ran = trace.blocks * trace.micro_batches, attention_forwards(trace)
    mine, others = ran.get(version, 0), {kind: count for kind, count in ran.items() if kind != version}
    if mine < wanted or others:
        return inactive(f"{told(ran)} kernels in {wanted} block forwards, {version} was asked for", ran=mine, expected=wanted)
    if not wanted:
        return unproven("the model has no blocks to count")
    return active(f"{mine} {version} kernels in {wanted} block forwards", ran=mine, expected=wanted)
