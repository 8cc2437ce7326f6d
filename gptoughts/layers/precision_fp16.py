"""Matmuls and attention in float16 with a loss scaler, weights and optimizer state in float32: tensor cores for Turing and Volta.

Float16 has few exponents: gradients below 6e-8 vanish and activations above 65,504 are infinite. The loss is therefore multiplied by a
scale before the backward and the gradients are divided by it after; a step whose gradients overflow is left out, the scale is halved,
and it doubles again after a while without one. One number is read from the device per step, to know whether the step may be taken.
It hurts where bf16 can be had, which needs none of this, and on CPUs, whose float16 products are slower than those of bf16.
Source: Micikevicius et al. 2018, Mixed Precision Training; torch's notes on automatic mixed precision, whose constants these are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gptoughts.errors import RunError
from gptoughts.models.torch_internals import scale_all
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
    unproven,
    unsupported,
)
from gptoughts.planning.matmul_dtypes import dtypes

NAME = "fp16"
SKIPPED = "fp16 skipped"
"""Under this name among the engine's marks: steps left out because their gradients overflowed."""
GROWTH, BACKOFF = 2.0, 0.5
LEAST_SCALE = 1.0
# Above this a scale is a number of float32 that a loss can hardly be multiplied with.
LARGEST_SCALE = 2.0**24


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """Tensor cores that multiply float16: compute capability 7.0."""
    if not 1 <= options["scale"] <= LARGEST_SCALE or math.frexp(options["scale"])[0] != 0.5:
        yield unsupported(
            f"scale needs a power of two from 1 to 2^24, here {options['scale']:g}", remedy="--layer.precision.scale 65536"
        )
    if not case.on_gpu:
        yield slower(
            "float16 matmuls ran at 1 to 33 GFLOP/s on CPUs where bf16 ran at 75 to 410", "docs/decisions.md, the loss scaler"
        )
        return
    least = case.machine.min_capability()
    if least is None or least < (7, 0):
        yield unsupported(f"needs compute capability 7.0, found {f'{least[0]}.{least[1]}' if least else 'unknown'}")


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """Half the bytes in matmuls, and a cast copy of the weights."""
    return budget.half()


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Autocast around forwards, scale around `backward`, divide before `clip`, and `step` only where the gradients are finite."""
    import torch

    from gptoughts.layers.support.matmul_flags import reduced_sums

    def autocast() -> torch.autocast:
        return torch.autocast(engine.device.type, dtype=torch.float16)

    scaler = LossScale(engine, options["scale"], options["growth_interval"])
    undo = [engine.wrap_context(verb, autocast) for verb in ("forward_context", "eval_context")]
    undo += [engine.wrap("backward", scaler.backward), engine.wrap("clip", scaler.clip), engine.wrap("step", scaler.step)]
    engine.extras[NAME] = scaler
    with reduced_sums("fp16", allowed=False):  # sums in float16 overflow, too
        yield
    engine.extras.pop(NAME)
    for back in undo:
        back()


class LossScale:
    """The scale, and what it does to the verbs of a step.

    Written here and not torch's GradScaler: that one steps the optimizer itself, past the verb that other layers wrap or replace, and
    tells nobody that it did not. Ranks need no word with each other: they share one gradient, so they find the same.
    """

    def __init__(self, engine: Engine, scale: float, growth_interval: int) -> None:
        self.engine, self.scale, self.growth_interval = engine, scale, growth_interval
        self.good_in_a_row = self.bad_in_a_row = self.skipped = 0
        self.finite: Any = None
        """Whether the gradients that `clip` saw are finite: a tensor on the device, read by `step`."""

    def backward(self, inner: Callable[[Any], None], loss: Any) -> None:
        """Gradients of the scaled loss."""
        inner(loss * self.scale)

    def clip(self, inner: Callable[[], Any]) -> Any:
        """Divide the gradients by the scale, which is a power of two and so exact, then clip. An overflow has norm 0: nothing of it is
        applied, and what is logged stays a number."""
        import torch

        gradients = [parameter.grad for parameter in self.engine.parameters() if parameter.grad is not None]
        scale_all(gradients, 1 / self.scale)
        norm = inner()
        self.finite = torch.isfinite(norm)
        return torch.where(self.finite, norm, torch.zeros_like(norm))

    def step(self, inner: Callable[[], bool]) -> bool:
        """Step, or after an overflow drop the gradients and halve the scale. Raises RunError where no scale helps."""
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
                f"precision=fp16: {self.bad_in_a_row} steps in a row had gradients that are not finite, down to a loss scale of "
                f"{self.scale:g}; the model itself overflows float16 or diverges\n"
                "  try: a lower --optim.learning-rate, or --layer.precision fp32; checkpoints from before are whole"
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "scale": self.scale,
            "good_in_a_row": self.good_in_a_row,
            "bad_in_a_row": self.bad_in_a_row,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the scale that was reached."""
        self.scale, self.skipped = float(state["scale"]), int(state["skipped"])
        self.good_in_a_row, self.bad_in_a_row = int(state["good_in_a_row"]), int(state["bad_in_a_row"])


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Every product took float16, the scale is a number, and the weights moved: a kernel of the optimizer can run and move none."""
    scaler = engine.extras.get(NAME)
    low, full = dtypes(trace, "c10::Half")
    if scaler is None:
        return inactive("the loss has no scale", fp16=low, fp32=full)
    if not low and not full:
        return unproven("the step ran no matmul and no convolution")
    figures = {"fp16": low, "fp32": full, "scale": scaler.scale, "skipped": scaler.skipped}
    if full or not low:
        return inactive(f"{full} of {low + full} matmuls took float32", **figures)
    if not trace.weights_moved:
        return inactive(f"no weight moved at a loss scale of {scaler.scale:g}, {scaler.skipped} steps were skipped", **figures)
    return active(f"all {low} matmuls took fp16, loss scale {scaler.scale:g}, {scaler.skipped} steps skipped so far", **figures)


LAYER = Layer(
    name=NAME,
    slot="precision",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    options={
        "scale": Option(2.0**16, "the loss scale to begin with, a power of two", float),
        "growth_interval": Option(2000, "steps without an overflow after which the scale doubles", int),
    },
    wraps=("forward_context", "eval_context", "backward", "clip", "step"),
    clashes={
        "in-backward": "whether gradients overflowed is known after the whole backward, and by then that layer has applied them",
    },
    changes_numerics=True,
)
