"""Matmuls and attention in bfloat16, weights and optimizer state in float32: half the memory traffic, at least twice the rate.

Softmax, norms and the loss stay in float32 (torch's autocast rules). It hurts on processors without bf16 units, where it is emulated,
and on small models, where casts cost more than matmuls save.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from gptoughts.layers.support.requirements import capability
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
)
from gptoughts.planning.matmul_dtypes import count_by_dtype

BF16_CPU = ("avx512_bf16", "amx_bf16", "bf16")
SMALLEST_CPU_WIDTH = 256


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """bf16 units, and on a CPU a model wide enough to use them."""
    if case.on_gpu:
        yield from capability(case, (8, 0))
        return
    if not set(BF16_CPU) & set(case.machine.cpu.instruction_sets):
        yield slower("this CPU has no bf16 unit and emulates it", "torch's documentation of CPU autocast")
    elif case.spec.width is not None and case.spec.width < SMALLEST_CPU_WIDTH:
        yield slower(
            f"width {case.spec.width} is below {SMALLEST_CPU_WIDTH}: on a CPU casts cost as much as matmuls save",
            "docs/measurements/cpu/widths.json",
        )


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Autocast training and evaluation forwards, with a new context for each."""
    import torch

    def autocast() -> torch.autocast:
        return torch.autocast(engine.device.type, dtype=torch.bfloat16)

    with ExitStack() as stack:
        for hook in ("forward_context", "eval_context"):
            stack.callback(engine.wrap_context(hook, autocast))
        yield


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require bf16 inputs for every matmul and convolution of the watched step."""
    low, full = count_by_dtype(trace, "c10::BFloat16")
    if not low and not full:
        return unproven("the step ran no matmul and no convolution")
    if full:
        return inactive(f"{full} of {low + full} matmuls took float32", bf16=low, fp32=full)
    return active(f"all {low} matmuls took bf16", bf16=low, fp32=full)


LAYER = Layer(
    name="bf16",
    slot="precision",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=lambda case, options, budget: budget.half(),
    unmet=unmet,
    wraps=("forward_context", "eval_context"),
    changes_numerics=True,
    tolerance=(2e-2, 0.99),
    compute_dtype="bf16",
    measured="docs/measurements/cpu/widths.json and layers.json on a CPU; not measured on a GPU",
)
