"""Numerics check: before step 1, compare every layer that changes numerics with the fp32 eager baseline on the run's weights and data.

Two blocks and the head are built with the run's own weights; one sequence of the first batch runs forward and backward, eager, in the
baseline and with each such layer, and loss and gradient are compared. It detects wrong kernels before a long run. For differences that
appear only over many steps use `gptoughts bench parity`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from gptoughts.config.loader import Recipe
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine, Source
from gptoughts.engine.objectives.base import Batch, Objective
from gptoughts.errors import LayerError
from gptoughts.hardware.world import World
from gptoughts.models.family import Family
from gptoughts.models.torch_internals import dropout_type
from gptoughts.planning.layer import SLOTS, Choice, Layer
from gptoughts.planning.resolve import Plan
from gptoughts.run.build import build_engine

BLOCKS = 2
SECONDS = 20.0
COMPARED = ("matmul", "attention", "kernels", "precision", "loss", "recompute", "offload")
"""Slots that change the forward or backward; compiled graphs, updates and ranks are compared over steps, by `bench parity`."""
SAME = (1e-4, 0.9999)
"""Tolerance of layers without their own (`Layer.tolerance`): they change only the order of summation."""


@dataclass(frozen=True)
class Compared:
    """Comparison of one layer with the baseline."""

    slot: str
    layer: str
    loss: float
    """Relative difference."""
    cosine: float
    allowed: tuple[float, float]
    baseline: str

    @property
    def near(self) -> bool:
        """Return whether both figures are within tolerance; NaN is not."""
        return self.loss <= self.allowed[0] and self.cosine >= self.allowed[1]

    def __str__(self) -> str:
        return f"{self.slot}={self.layer}: loss {100 * self.loss:.2g} %, gradient cosine {self.cosine:.6f}"

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {**vars(self), "allowed": list(self.allowed), "near": self.near}


@dataclass(frozen=True)
class Numerics:
    """Comparisons, layers skipped for lack of time, and seconds."""

    compared: tuple[Compared, ...]
    left_out: tuple[str, ...]
    seconds: float

    def lines(self) -> Iterator[str]:
        """Yield lines for the console."""
        if self.compared or self.left_out:
            yield f"numerics check: {BLOCKS} blocks and the head against the baseline, {self.seconds:.1f} s"
        yield from (f"  {one}" for one in self.compared)
        if self.left_out:
            yield f"  skipped for time: {', '.join(self.left_out)}"

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"compared": [one.to_json() for one in self.compared], "left_out": list(self.left_out), "seconds": self.seconds}

    @property
    def near(self) -> bool:
        """Return whether every compared layer is within its tolerance."""
        return all(one.near for one in self.compared)

    def demand(self) -> None:
        """Raise one LayerError for all layers beyond tolerance."""
        far = [one for one in self.compared if not one.near]
        if far:
            rows = [f"  {one}; tolerance {100 * one.allowed[0]:g} %, cosine {one.allowed[1]:g}" for one in far]
            raise LayerError(
                "\n".join(["Numerics check failed: these layers differ from the fp32 eager baseline beyond tolerance", *rows]),
                fix=f"{' '.join(f'--layer.{one.slot} {one.baseline}' for one in far)}, or --numerics off to skip the check",
            )


class _Part:
    """Weights for the first blocks only; unused weights of the others are not an error."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return the source's tensor."""
        return self.source.tensor(name, shape)

    def buffer(self, name: str) -> Tensor | None:
        """Return the source's buffer."""
        return self.source.buffer(name)

    def unused(self) -> list[str]:
        """Return no names."""
        return []


def compare(
    recipe: Recipe,
    plan: Plan,
    catalog: Mapping[str, Layer],
    family: Family,
    objective: Objective,
    device: torch.device,
    *,
    batch: Batch,
    model: Callable[[], nn.Module],
    weights: Callable[[nn.Module], Source],
    late: Callable[[bool], bool] = bool,
) -> Numerics:
    """Compare every layer of `plan` that changes numerics with the baseline, until the next would exceed 20 s; list skipped layers.

    `model` creates the recipe's model on meta, `weights` its weight source; `batch` is on the device, and its first sequence with
    trained tokens is used. `late` combines "time is up" over ranks. Dropout is off, and random state is restored.
    """
    began = perf_counter()
    planned = [
        choice
        for choice in plan.choices
        if choice.slot in COMPARED and catalog[choice.layer].changes_numerics and not catalog[choice.layer].baseline
    ]
    rows = len(next(iter(batch.values())))
    singles = ({key: value[row : row + 1] for key, value in batch.items()} for row in range(rows))
    # A sequence without trained tokens has no loss to compare.
    first = next((one for one in singles if float(objective.weight(one)) > 0), {key: value[:1] for key, value in batch.items()})

    def run(choices: tuple[Choice, ...]) -> tuple[float, list[Tensor]]:
        small = shortened(model(), family)
        made = replace(plan, choices=choices)
        stream: Iterator[Any] = iter(())
        with build_engine(
            small, family, copy.copy(objective), recipe, made, catalog,
            ranks=Ranks(World(), device), batches=stream, source=_Part(weights(small)),
        ) as engine:  # fmt: skip
            return _gradient(engine, first)

    if not planned:
        return Numerics((), (), 0.0)
    drawn = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    base = run(tuple(_baseline(slot, catalog) for slot in SLOTS))
    longest = perf_counter() - began
    done: list[Compared] = []
    for choice in planned:
        if late(perf_counter() - began + longest > SECONDS):
            break
        since = perf_counter()
        done.append(_compared(choice, base, run(alone(choice, plan, catalog)), plan, catalog))
        longest = max(longest, perf_counter() - since)
    torch.set_rng_state(drawn[0])
    if drawn[1] is not None:
        torch.cuda.set_rng_state(drawn[1], device)
    return Numerics(tuple(done), tuple(f"{one.slot}={one.layer}" for one in planned[len(done) :]), perf_counter() - began)


def shortened(model: nn.Module, family: Family) -> nn.Module:
    """Return `model` cut to its first blocks, which keep their names."""
    names = list(family.blocks(model))
    parent = names[0].rpartition(".")[0] if names else ""
    if len(names) > BLOCKS and isinstance(model.get_submodule(parent), nn.ModuleList):
        holder, _, name = parent.rpartition(".")
        whole = model.get_submodule(parent)
        setattr(model.get_submodule(holder), name, whole[:BLOCKS])  # type: ignore[index]
    return model


def alone(choice: Choice, plan: Plan, catalog: Mapping[str, Layer]) -> tuple[Choice, ...]:
    """Return baselines for all slots except that of `choice` and those its layer needs."""
    needed = {choice.slot, *(slot for slot in catalog[choice.layer].needs_slots if slot in COMPARED)}
    return tuple(plan.choice(slot) if slot in needed else _baseline(slot, catalog) for slot in SLOTS)


def _baseline(slot: str, catalog: Mapping[str, Layer]) -> Choice:
    layer = next(layer for layer in catalog.values() if layer.slot == slot and layer.baseline)
    return Choice(slot, layer.name, layer.read_options({}, "numerics"), "numerics")


def _gradient(engine: Engine, batch: Batch) -> tuple[float, list[Tensor]]:
    engine.model.train()
    for module in engine.bare.modules():
        if isinstance(module, dropout_type()):
            module.eval()  # dropout masks differ between kernels and dtypes
    # As in a step, divide the sum by its weight: loss scales assume a mean, not a sum over tokens.
    weight = max(1.0, float(engine.objective.weight(batch)))
    with engine.grad_sync(True):
        with engine.forward_context():
            loss = engine.objective(engine.model, batch) / weight
        engine.backward(loss)
    missing = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in engine.parameters()]
    return float(loss.detach()), [gradient.detach() for gradient in missing]


def _compared(
    choice: Choice,
    base: tuple[float, list[Tensor]],
    other: tuple[float, list[Tensor]],
    plan: Plan,
    catalog: Mapping[str, Layer],
) -> Compared:
    (loss, gradient), (its, theirs) = base, other
    pairs = list(zip(gradient, theirs, strict=True))
    dot, one, two = (
        float(sum((a.double() * b.double()).sum() for a, b in rows))
        for rows in (pairs, [(a, a) for a, _ in pairs], [(b, b) for _, b in pairs])
    )
    cosine = dot / (one * two) ** 0.5 if one * two != 0 else float(one == two)  # NaN stays NaN
    beside = [made.layer for made in alone(choice, plan, catalog)]
    tolerances = [found for name in beside if (found := catalog[name].tolerance)] or [SAME]
    allowed = max(loss for loss, _ in tolerances), min(cosine for _, cosine in tolerances)
    far = abs(its - loss) / max(abs(loss), 1e-30)
    return Compared(choice.slot, choice.layer, far, cosine, allowed, _baseline(choice.slot, catalog).layer)
