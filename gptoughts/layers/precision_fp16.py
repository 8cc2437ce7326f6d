"""Matmuls and attention in float16 with a loss scaler, weights and optimizer state in float32: tensor cores for Turing and Volta.

Float16 has a small exponent range: gradients below 6e-8 underflow and activations above 65,504 are infinite. The loss is therefore
multiplied by a scale before the backward and the gradients are divided by it after; a step with overflowing gradients is skipped and
halves the scale, which doubles again after a period without overflow. One number per step is read from the device, to decide on the step.
It hurts where bf16 is supported, which needs no scale, and on CPUs, where float16 matmuls are slower than bf16.
Source: Micikevicius et al. 2018, Mixed Precision Training; constants from torch's notes on automatic mixed precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from gptoughts.errors import RunError
from gptoughts.layers.support.requirements import capability
from gptoughts.models.torch_internals import scale_all
from gptoughts.planning.layer import (
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
    unproven,
    unsupported,
)
from gptoughts.planning.matmul_dtypes import count_by_dtype

NAME = "fp16"
SKIPPED = "fp16 skipped"
"""Call count of steps skipped because their gradients overflowed."""
GROWTH, BACKOFF = 2.0, 0.5
LEAST_SCALE = 1.0
# Larger scales risk overflowing the float32 loss.
LARGEST_SCALE = 2.0**24


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """A scale that is a power of two, and float16 tensor cores: compute capability 7.0."""
    if not 1 <= options["scale"] <= LARGEST_SCALE or math.frexp(options["scale"])[0] != 0.5:
        yield unsupported(
            f"scale must be a power of two from 1 to 2^24, found {options['scale']:g}", remedy="--layer.precision.scale 65536"
        )
    if not case.on_gpu:
        yield slower(
            "float16 matmuls ran at 1 to 33 GFLOP/s on CPUs where bf16 ran at 75 to 410", "docs/decisions.md, the loss scaler"
        )
        return
    yield from capability(case, (7, 0))


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Autocast forwards, scale in `backward`, unscale in `clip`, and skip `step` for non-finite gradients."""
    import torch

    from gptoughts.layers.support.matmul_flags import reduced_sums

    def autocast() -> torch.autocast:
        return torch.autocast(engine.device.type, dtype=torch.float16)

    scaler = LossScale(engine, options["scale"], options["growth_interval"])
    with ExitStack() as stack:
        for hook in ("forward_context", "eval_context"):
            stack.callback(engine.wrap_context(hook, autocast))
        for hook, wrapper in (("backward", scaler.backward), ("clip", scaler.clip), ("step", scaler.step)):
            stack.callback(engine.wrap(hook, wrapper))
        engine.extras[NAME] = scaler
        stack.callback(engine.extras.pop, NAME)
        stack.enter_context(reduced_sums("fp16", allowed=False))  # sums in float16 overflow as well
        yield


class LossScale:
    """Loss scale and its step hooks.

    Not torch's GradScaler: that one steps the optimizer itself, bypassing the hook that other layers wrap or replace, and does not report
    a skipped step. Ranks need no communication: they share one gradient, so they reach the same decision.
    """

    def __init__(self, engine: Engine, scale: float, growth_interval: int) -> None:
        self.engine, self.scale, self.growth_interval = engine, scale, growth_interval
        self.good_in_a_row = self.bad_in_a_row = self.skipped = 0
        self.finite: Any = None
        """Whether the gradients in `clip` were finite: a tensor on the device, read by `step`."""

    def backward(self, inner: Callable[[Any], None], loss: Any) -> None:
        """Compute gradients of the scaled loss."""
        inner(loss * self.scale)

    def clip(self, inner: Callable[[], Any]) -> Any:
        """Divide gradients by the scale (exact: a power of two), then clip. Return norm 0 for an overflow, whose update is skipped, so
        that the log stays finite."""
        import torch

        gradients = [parameter.grad for parameter in self.engine.parameters() if parameter.grad is not None]
        scale_all(gradients, 1 / self.scale)
        norm = inner()
        self.finite = torch.isfinite(norm)
        return torch.where(self.finite, norm, torch.zeros_like(norm))

    def step(self, inner: Callable[[], bool]) -> bool:
        """Step, or after an overflow drop the gradients and halve the scale. Raises RunError below the smallest scale."""
        finite, self.finite = self.finite is None or bool(self.finite), None
        if finite:
            self.good_in_a_row, self.bad_in_a_row = self.good_in_a_row + 1, 0
            if self.good_in_a_row >= self.growth_interval:
                self.scale, self.good_in_a_row = min(self.scale * GROWTH, LARGEST_SCALE), 0
            return inner()
        if self.engine.optimizer is not None:
            self.engine.optimizer.zero_grad(set_to_none=True)
        self.skipped, self.bad_in_a_row, self.good_in_a_row = self.skipped + 1, self.bad_in_a_row + 1, 0
        self.engine.counters.call_counts[SKIPPED] += 1
        self.scale *= BACKOFF
        if self.scale < LEAST_SCALE:
            raise RunError(
                f"precision=fp16: {self.bad_in_a_row} consecutive steps with non-finite gradients, down to a loss scale of "
                f"{self.scale:g}; the model overflows float16 or diverges",
                fix="a lower --optim.learning-rate, or --layer.precision fp32; earlier checkpoints are intact",
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers."""
        return {
            "scale": self.scale,
            "good_in_a_row": self.good_in_a_row,
            "bad_in_a_row": self.bad_in_a_row,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume with the saved scale."""
        self.scale, self.skipped = float(state["scale"]), int(state["skipped"])
        self.good_in_a_row, self.bad_in_a_row = int(state["good_in_a_row"]), int(state["bad_in_a_row"])


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require float16 inputs for every matmul, a loss scale, and changed weights: an optimizer kernel can run without changing any."""
    scaler = engine.extras.get(NAME)
    low, full = count_by_dtype(trace, "c10::Half")
    if scaler is None:
        return inactive("no loss scale", fp16=low, fp32=full)
    if not low and not full:
        return unproven("the step ran no matmul and no convolution")
    figures = {"fp16": low, "fp32": full, "scale": scaler.scale, "skipped": scaler.skipped}
    if full or not low:
        return inactive(f"{full} of {low + full} matmuls took float32", **figures)
    if not trace.weights_moved:
        return inactive(f"no weight changed at loss scale {scaler.scale:g}, {scaler.skipped} steps skipped", **figures)
    return active(f"all {low} matmuls took fp16, loss scale {scaler.scale:g}, {scaler.skipped} steps skipped so far", **figures)


LAYER = Layer(
    name=NAME,
    slot="precision",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=lambda case, options, budget: budget.half(),
    unmet=unmet,
    options={
        "scale": Option(2.0**16, "initial loss scale, a power of two", float),
        "growth_interval": Option(2000, "steps without overflow before the scale doubles", int),
    },
    wraps=("forward_context", "eval_context", "backward", "clip", "step"),
    clashes={
        "in-backward": "overflow is known only after the whole backward, when that layer has applied the gradients",
    },
    changes_numerics=True,
    tolerance=(2e-2, 0.99),
    compute_dtype=NAME,
)
