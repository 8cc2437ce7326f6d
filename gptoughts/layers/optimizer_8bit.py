"""AdamW's two moments in 8 bits instead of 32: optimizer state falls from 8 bytes a parameter to 2, at some cost in time.

Every block of 256 values keeps one scale, and the arithmetic of the update is float32. Moments stay in float32 for tensors with fewer
than 4,096 values, and for embeddings and fused experts, of which a batch moves few entries: there a second moment that 8 bits round to
zero throws a weight far away. It hurts in time: moments are unpacked and packed again at every update (Llama-2-7B on an A100, bf16:
51.6 GB and 3,200 tok/s with 32 bits, 39.1 GB and 2,900 with 8: torchao's README). `package` says whose: torchao compiles one kernel per
shape at the first update on a GPU and runs operator by operator on a CPU; bitsandbytes brings kernels of its own.
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
from gptoughts.planning.memory_fit import counted, memory_of_rank

FULL, PACKED = (
    8,
    2 * (1 + 4 / 256),
)  # bytes of two moments: in float32, and in one byte each with a float32 scale for 256 values
# What the update holds for itself on a CPU, operator by operator: bytes per value of the largest tensor whose moments are float32, and of
# the largest whose moments are packed. Measured with torch 2.13, torchao 0.18 and bitsandbytes 0.50: tests/layers/test_eight_bit.py.
TEMPORARY = {"torchao": (24, 53), "bitsandbytes": (12, 20)}
MEMORY_SHARE = 0.05  # of the device; below that the time is not worth it
FULL_UPDATES = ("aten::_fused_adamw_", "aten::_foreach_addcdiv_")


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """AdamW, the package that was asked for, and enough parameters for the state to weigh something."""
    name, package = case.recipe.optim.name, options["package"]
    if name != "adamw":
        yield unsupported(f"8-bit state is AdamW's, and optim.name is {name}", "--layer.optimizer plain")
        return
    if package not in case.machine.packages:
        yield unsupported(f"needs the package {package}, not installed", "pip install 'gptoughts[lowbit]'")
        return
    if case.on_gpu and package == "torchao" and "triton" not in case.machine.packages:
        yield unsupported("torchao compiles its update: needs the package triton, not installed", "pip install triton")
        return
    budget, have = counted(case), memory_of_rank(case)
    if budget is None:
        yield slower("not all sizes of the model are known before its data is read", "optimizer state cannot be weighed")
        return
    saved = budget.optimizer - memory(case, options, budget).optimizer
    if have is not None and saved < MEMORY_SHARE * have:
        yield slower(f"saves {bytes_in_words(saved)} of {bytes_in_words(have)}", "torchao's README: 9 % fewer tokens a second")


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """Two bytes and a share of a scale for a weight, and eight where moments stay in float32."""
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
    """Weights whose moments stay in float32: embeddings (a tied head is one), and fused experts. An adapter trains neither."""
    spec = case.spec
    if case.recipe.adapter.kind != "none":
        return 0
    idle = (spec.parameters or 0) - (spec.active_parameters or spec.parameters or 0)
    experts, chosen = spec.experts or 0, spec.experts_per_token or 0
    fused = idle * experts // (experts - chosen) if experts > chosen else 0
    return (spec.embedding_parameters or 0) + fused


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Give the engine the package's 8-bit AdamW over the recipe's groups."""
    from gptoughts.engine.optim.factory import attached

    with attached(engine, options["package"]):
        yield


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """The moments of every parameter that is large enough are 8-bit codes, no float32 update ran, and weights moved."""
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
        return inactive(f"state of {packed} parameters in 8 bits, and no weight moved", **figures)
    return active(
        f"state of {packed} of {len(large)} large parameters in 8 bits by {options['package']}, {len(held) - len(large)} others in "
        f"float32: {100 * share:.0f} % of float32's bytes",
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
    options={"package": Option("torchao", "whose 8-bit AdamW", str, ("torchao", "bitsandbytes"))},
    changes_numerics=True,
    measured="docs/measurements/cpu/parity.json on a CPU (its loss after 300 steps is within the noise of seeds); not measured on a GPU",
)
