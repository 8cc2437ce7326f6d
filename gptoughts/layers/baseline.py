"""Baselines: plain PyTorch, one layer per slot. Ablations, proofs and the numerics check compare with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from gptoughts.planning.layer import (
    Case,
    Engine,
    Evidence,
    Layer,
    Options,
    Phase,
    Reason,
    StepTrace,
    active,
    inactive,
    unsupported,
)


@contextmanager
def _nothing(engine: Engine, options: Options) -> Iterator[None]:
    yield


def _is_baseline(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    return active("baseline")


def _baseline(
    slot: str,
    name: str,
    card: str,
    apply: Callable[[Any, Options], AbstractContextManager[None]] = _nothing,
    verify: Callable[[Any, StepTrace, Options], Evidence] = _is_baseline,
    **more: Any,
) -> Layer:
    return Layer(name=name, slot=slot, card=card, apply=apply, verify=verify, baseline=True, measured="reference", **more)


def _one_process(case: Case, options: Options) -> Iterator[Reason]:
    if case.world.world_size > 1:
        yield unsupported(
            f"{case.world.world_size} ranks would train {case.world.world_size} separate models",
            "--layer.parallel ddp",
        )


def _length_is_known(case: Case, options: Options) -> Iterator[Reason]:
    train = case.recipe.train
    if case.recipe.optim.name == "ademamix" and train.steps is None and train.tokens is None:
        yield unsupported(
            "optim.name = ademamix schedules alpha and beta3 over the run and needs its length in updates",
            "--train.steps N or --train.tokens N",
        )


@contextmanager
def _plain_optimizer(engine: Engine, options: Options) -> Iterator[None]:
    from gptoughts.engine.optim.factory import attached

    with attached(engine, "plain"):
        yield


def _all_updated(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require optimizer state for every parameter, no fused update, and changed weights."""
    from gptoughts.engine.optim.factory import covered

    name = engine.recipe.optim.name
    known, given = covered(engine.optimizer) if engine.optimizer else (0, 0)
    fused = trace.calls("_fused_adam")
    if not trace.weights_moved:
        return inactive(f"no weight changed in the watched step of {name}")
    if not known or fused:
        return inactive(f"{name}: state of {known} of {given} parameters, {fused} fused updates", known=known, fused=fused)
    return active(f"{name}: state of {known} of {given} parameters, weights changed", known=known)


@contextmanager
def _direct(engine: Engine, options: Options) -> Iterator[None]:
    from gptoughts.data.device import to_device

    before = engine.batches
    engine.batches = ((to_device(batch, engine.device), cursor) for batch, cursor in before)
    try:
        yield
    finally:
        engine.batches = before


@contextmanager
def _whole(engine: Engine, options: Options) -> Iterator[None]:
    before, engine.micro_batch = engine.micro_batch, None
    try:
        yield
    finally:
        engine.micro_batch = before


SYSTEM = _baseline("host", "system", "Thread counts and affinity as set by the operating system and torch.")
NATIVE = _baseline("allocator", "native", "Torch's caching allocator with fixed segments.")
IEEE = _baseline("matmul", "ieee", "Float32 matmuls in full float32.", compute_dtype="fp32")
MATH = _baseline(
    "attention", "math", "Unfused attention: scores, softmax in float32, weighted sum; memory grows with T squared."
)
TORCH_KERNELS = _baseline("kernels", "torch-kernels", "Norm, rotary and activation as torch operators.")
FP32 = _baseline("precision", "fp32", "Weights, activations and gradients in float32.")
FULL_CE = _baseline("loss", "full-ce", "Cross-entropy over all logits at once, in float32.")
KEEP = _baseline("recompute", "keep", "Keeps every activation for the backward.")
RESIDENT = _baseline("offload", "resident", "Activations stay on the device.")
EAGER = _baseline("compile", "eager", "Operators run one at a time, launched from Python.")
SINGLE = _baseline("parallel", "single", "One process.", unmet=_one_process)
PLAIN = _baseline(
    "optimizer",
    "plain",
    "The recipe's optimizer, one parameter and one operator at a time.",
    _plain_optimizer,
    _all_updated,
    unmet=_length_is_known,
    wraps=("eval_context",),
)
WITH_WEIGHTS = _baseline("optimizer_offload", "with-weights", "Optimizer state on the same device as the weights.")
AFTER_CLIP = _baseline("update", "after-clip", "Gradients are computed, clipped, then applied in one update.")
DIRECT = _baseline("loader", "direct", "Reads and copies each batch when the step needs it.", _direct, phase=Phase.REAL)
WHOLE = _baseline("microbatch", "whole", "The rank's share of the global batch in one forward.", _whole)
