"""AdamW's two moments in 8 bits instead of 32: optimiser state falls from 8 bytes a parameter to 2, at some cost in time.

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

from gptoughts.layer import (
    Budget,
    Case,
    Engine,
    Evidence,
    Layer,
    Option,
    Options,
    Reason,
    Sight,
    active,
    cannot,
    inactive,
    would_not_pay,
)

BYTES_SAVED = 6  # of the 8 that two float32 moments take
MEMORY_SHARE = 0.05  # of the device; below that the time is not worth it
FULL_UPDATES = ("aten::_fused_adamw_", "aten::_foreach_addcdiv_")


def fits(case: Case, options: Options) -> Iterator[Reason]:
    """AdamW, the package that was asked for, and enough parameters for the state to weigh something."""
    name, package = case.recipe.optim.name, options["package"]
    if name != "adamw":
        yield cannot(f"8-bit state is AdamW's, and optim.name is {name}", "--layer.optimizer plain")
        return
    if package not in case.machine.packages:
        yield cannot(f"needs the package {package}, not installed", "pip install 'gptoughts[lowbit]'")
        return
    if case.on_gpu and package == "torchao" and "triton" not in case.machine.packages:
        yield cannot("torchao compiles its update: needs the package triton, not installed", "pip install triton")
        return
    sizes = [gpu.memory_bytes for gpu in case.machine.gpus] if case.on_gpu else [case.machine.memory_bytes]
    known = [size for size in sizes if size]
    saved = BYTES_SAVED * (case.facts.parameters or 0)
    if known and saved < MEMORY_SHARE * min(known):
        yield would_not_pay(
            f"saves {saved / 2**30:.1f} GiB of {min(known) / 2**30:.0f} GiB", "torchao's README: 9 % fewer tokens a second"
        )


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """Both moments in one byte each, and a float32 scale for 256 values."""
    return replace(budget, optimizer=int(budget.optimizer * (1 + 4 / 256) / 4))


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Give the engine the package's 8-bit AdamW over the recipe's groups."""
    from gptoughts.optimisers import attached

    with attached(engine, options["package"]):
        yield


def verify(engine: Engine, sight: Sight, options: Options) -> Evidence:
    """The moments of every parameter that is large enough are 8-bit codes, no float32 update ran, and weights moved."""
    from gptoughts.lowbit import bytes_of, in_eight_bits, packs

    held = [(parameter, state) for parameter, state in engine.optimizer.state.items() if state] if engine.optimizer else []
    large = [(parameter, state) for parameter, state in held if packs(engine.optimizer, parameter)]
    packed = sum(in_eight_bits(state) for _, state in large)
    full = sum(sight.operators[name].calls for name in FULL_UPDATES if name in sight.operators)
    size = sum(bytes_of(state) for _, state in held)
    share = size / max(1, sum(8 * parameter.numel() for parameter, _ in held))
    figures = {"packed": packed, "large": len(large), "bytes": size, "share": share}
    if not large:
        return inactive(f"none of {len(held)} parameters has 8-bit state", **figures)
    if packed < len(large) or full:
        return inactive(
            f"state of {packed} of {len(large)} large parameters in 8 bits, {full} fused float32 updates", **figures
        )
    if not sight.weights_moved:
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
    fits=fits,
    options={"package": Option("torchao", "whose 8-bit AdamW", str, ("torchao", "bitsandbytes"))},
    changes_numerics=True,
)
