"""AdamW's two moments in 8 bits instead of 32: optimizer state falls from 8 bytes a parameter to 2, at some cost in time.

Every block of 256 values has one scale, and updates are computed in float32. Moments stay in float32 for tensors with fewer than 4,096
values, and for embeddings and fused experts, where a batch updates few entries: a second moment that 8 bits round to zero makes the next
update of that weight huge. It hurts speed: moments are unpacked and packed at every update (Llama-2-7B on an A100, bf16: 51.6 GB and
3,200 tok/s with 32 bits, 39.1 GB and 2,900 with 8: torchao's README). `package` selects the implementation: torchao compiles one kernel
per shape at the first update on a GPU and runs operator by operator on a CPU; bitsandbytes has its own kernels.
Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from gptoughts.console import bytes_in_words
from gptoughts.planning.layer import (
    Budget,
    Case,
    Engine,
    Evidence,
    Layer,
    Option,
    Options,
    Reason,
    StepTrace,
    active,
    inactive,
    slower,
    unsupported,
)
from gptoughts.planning.memory_fit import current_budget, memory_of_rank

FULL, PACKED = (
    8,
    2 * (1 + 4 / 256),
)  # bytes of two moments: in float32, and in one byte each with a float32 scale for 256 values
# Temporary memory of the update on a CPU: bytes per value of the largest tensor with float32 moments, and of the largest with packed
# moments. Measured with torch 2.13, torchao 0.18 and bitsandbytes 0.50: tests/layers/test_eight_bit.py.
TEMPORARY = {"torchao": (24, 53), "bitsandbytes": (12, 20)}
MEMORY_SHARE = 0.05  # of the device; smaller savings are not worth the time
FULL_UPDATES = ("aten::_fused_adamw_", "aten::_foreach_addcdiv_")


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """AdamW, the selected package, and optimizer state that takes a relevant share of memory."""
    name, package = case.recipe.optim.name, options["package"]
    if name != "adamw":
        yield unsupported(f"8-bit state needs AdamW, optim.name is {name}", "--layer.optimizer plain")
        return
    if package not in case.machine.packages:
        yield unsupported(f"needs the package {package}, not installed", "pip install 'gptoughts[lowbit]'")
        return
    if case.on_gpu and package == "torchao" and "triton" not in case.machine.packages:
        yield unsupported("torchao's update needs the package triton, not installed", "pip install triton")
        return
    budget, have = current_budget(case), memory_of_rank(case)
    if budget is None:
        yield slower("model size unknown before the data is read", "size of the optimizer state unknown")
        return
    saved = budget.optimizer - memory(case, options, budget).optimizer
    if have is not None and saved < MEMORY_SHARE * have:
        yield slower(f"saves {bytes_in_words(saved)} of {bytes_in_words(have)}", "torchao's README: 9 % fewer tokens a second")


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """Two bytes and a share of a scale per weight; eight where moments stay in float32."""
    whole = FULL * min(_sparsely_graded(case), budget.optimizer // FULL)
    optimizer = whole + int((budget.optimizer - whole) * PACKED / FULL)
    if case.on_gpu or case.recipe.adapter.kind != "none":
        return replace(budget, optimizer=optimizer)
    in_full, in_eight = TEMPORARY[options["package"]]
    branches = 2 if budget.gated and case.recipe.model.family in ("gpt", "llada") else 1  # of an MLP, in one weight
    largest = max(budget.width * budget.inner_width * branches, 0 if case.spec.tied else budget.vocab_size * budget.width)
    temporary = max(in_full * (case.spec.embedding_parameters or 0), in_eight * largest)
    return replace(budget, optimizer=optimizer, temporary=temporary)


def _sparsely_graded(case: Case) -> int:
    """Count weights whose moments stay in float32: embeddings (a tied head is one) and fused experts. An adapter trains neither."""
    spec = case.spec
    if case.recipe.adapter.kind != "none":
        return 0
    idle = (spec.parameters or 0) - (spec.active_parameters or spec.parameters or 0)
    experts, chosen = spec.experts or 0, spec.experts_per_token or 0
    fused = idle * experts // (experts - chosen) if experts > chosen else 0
    return (spec.embedding_parameters or 0) + fused


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Set the package's 8-bit AdamW over the recipe's parameter groups."""
    from gptoughts.engine.optim.factory import attached

    with attached(engine, options["package"]):
        yield


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require 8-bit moments for every large parameter, no float32 update, and changed weights."""
    from gptoughts.engine.optim.low_bit import bytes_of, in_eight_bits, packs

    held = [(parameter, state) for parameter, state in engine.optimizer.state.items() if state] if engine.optimizer else []
    large = [(parameter, state) for parameter, state in held if packs(engine.optimizer, parameter)]
    packed = sum(in_eight_bits(state) for _, state in large)
    full = sum(trace.operators[name].calls for name in FULL_UPDATES if name in trace.operators)
    size = sum(bytes_of(state) for _, state in held)
    share = size / max(1, sum(8 * parameter.numel() for parameter, _ in held))
    figures = {"packed": packed, "large": len(large), "bytes": size, "share": share}
    if not large:
        return inactive(f"none of {len(held)} parameters has 8-bit state", **figures)
    if packed < len(large) or full:
        return inactive(
            f"state of {packed} of {len(large)} large parameters in 8 bits, {full} fused float32 updates", **figures
        )
    if not trace.weights_moved:
        return inactive(f"state of {packed} parameters in 8 bits, no weight changed", **figures)
    return active(
        f"state of {packed} of {len(large)} large parameters in 8 bits by {options['package']}, {len(held) - len(large)} others in "
        f"float32: {100 * share:.0f} % of the float32 size",
        **figures,
    )


LAYER = Layer(
    name="8bit",
    slot="optimizer",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    options={"package": Option("torchao", "implementation of 8-bit AdamW", str, ("torchao", "bitsandbytes"))},
    changes_numerics=True,
    memory_rank=30,
    measured="docs/measurements/cpu/parity.json on a CPU (loss after 300 steps within seed noise); not measured on a GPU",
)
