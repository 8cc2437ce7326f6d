"""Matmuls and attention in bfloat16, weights and optimizer state in float32: half the memory traffic, twice the rate or more.

Softmax, norms and the loss stay in float32 (torch's autocast rules). It hurts on processors without bf16 units, where it is emulated,
and on small models, where the casts cost more than the matmuls save.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gptoughts.planning.layer import (
    Budget,
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
from gptoughts.planning.matmul_dtypes import dtypes

BF16_CPU = ("avx512_bf16", "amx_bf16", "bf16")
SMALLEST_CPU_WIDTH = 256


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """Units that multiply bf16, and on a CPU a model wide enough to fill them."""
    least = case.machine.min_capability()
    if case.on_gpu and (least is None or least < (8, 0)):
        yield unsupported(f"needs compute capability 8.0, found {f'{least[0]}.{least[1]}' if least else 'unknown'}")
    if case.on_gpu:
        return
    if not set(BF16_CPU) & set(case.machine.cpu.instruction_sets):
        yield slower("this CPU has no bf16 unit and would emulate it", "torch's documentation of CPU autocast")
    elif case.spec.width is not None and case.spec.width < SMALLEST_CPU_WIDTH:
        yield slower(
            f"width {case.spec.width} is below {SMALLEST_CPU_WIDTH}, where casts cost what matmuls save on a CPU",
            "docs/measurements/cpu/widths.json",
        )


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """Half the bytes in matmuls, and a cast copy of the weights."""
    return budget.half()


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Autocast around training and evaluation forwards. Factories, so that every step enters a fresh context."""
    import torch

    def autocast() -> torch.autocast:
        return torch.autocast(engine.device.type, dtype=torch.bfloat16)

    undo = [engine.wrap_context(verb, autocast) for verb in ("forward_context", "eval_context")]
    yield
    for back in undo:
        back()


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """The dtypes that went into every matmul and convolution of the watched step."""
    low, full = dtypes(trace, "c10::BFloat16")
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
    memory=memory,
    unmet=unmet,
    wraps=("forward_context", "eval_context"),
    changes_numerics=True,
    measured="docs/measurements/cpu/widths.json and layers.json on a CPU; not measured on a GPU",
)
