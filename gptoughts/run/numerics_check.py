"""Before the first step: does each layer that changes arithmetic compute, with these weights and this text, what the baseline computes?

Two blocks and the head are built with the run's own weights, and one sequence of the first batch goes forward and backward, eager, once in
the baseline and once for every such layer; loss and gradient are compared. It finds a kernel that is wrong here before days are spent on it.
What shows only over many steps is for `gptoughts bench parity`.
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
from gptoughts.hardware.machine import World
from gptoughts.models.family import Family
from gptoughts.models.torch_internals import dropout_type
from gptoughts.planning.layer import SLOTS, Choice, Layer
from gptoughts.planning.resolve import Plan
from gptoughts.run.build import build_engine

BLOCKS = 2
SECONDS = 20.0
COMPARED = ("matmul", "attention", "kernels", "precision", "loss", "recompute", "offload")
"""Slots whose layers change what a forward and a backward compute; compiled graphs, updates and ranks are compared over steps."""
TOLERANCE = {
    "tf32": (1e-2, 0.999),
    "bf16": (2e-2, 0.99),
    "fp16": (2e-2, 0.99),
    "fp8-te": (5e-2, 0.95),
    "fp8-torchao": (5e-2, 0.95),
}
"""Most relative difference of the loss and least cosine of the gradient; other layers only add in another order, in the precision that
their needs put beside them."""
SAME = (1e-4, 0.9999)


@dataclass(frozen=True)
class Compared:
    """One layer beside the baseline."""

    slot: str
    layer: str
    loss: float
    """Relative difference."""
    cosine: float
    allowed: tuple[float, float]
    baseline: str

    @property
    def near(self) -> bool:
        """Whether both figures are within what is allowed; those that are no number are not."""
        return self.loss <= self.allowed[0] and self.cosine >= self.allowed[1]

    def __str__(self) -> str:
        return f"{self.slot}={self.layer}: loss {100 * self.loss:.2g} %, gradient cosine {self.cosine:.6f}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "allowed": list(self.allowed), "near": self.near}


@dataclass(frozen=True)
class Numerics:
    """What was compared, what was left out for lack of time, and what it cost."""

    compared: tuple[Compared, ...]
    left_out: tuple[str, ...]
    seconds: float

    def lines(self) -> Iterator[str]:
        """For the console."""
        if self.compared or self.left_out:
            yield f"numerics of {BLOCKS} blocks and the head against the baseline, {self.seconds:.1f} s"
        yield from (f"  {one}" for one in self.compared)
        if self.left_out:
            yield f"  left out for time: {', '.join(self.left_out)}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"compared": [one.to_json() for one in self.compared], "left_out": list(self.left_out), "seconds": self.seconds}

    @property
    def near(self) -> bool:
        """Whether every layer that was compared is as near as its kind must be."""
        return all(one.near for one in self.compared)

    def demand(self) -> None:
        """Raise LayerError for every layer that computes something else than the baseline."""
        far = [
            f"  {one}; allowed are {100 * one.allowed[0]:g} % and {one.allowed[1]:g}" for one in self.compared if not one.near
        ]
        if far:
            raise LayerError(
                "planned, and other numbers than the baseline's with these weights and this text\n"
                + "\n".join(far)
                + f"\n  try: {' '.join(f'--layer.{one.slot} {one.baseline}' for one in self.compared if not one.near)}, "
                "or --numerics off to train all the same"
            )


class _Part:
    """Weights for the first blocks alone: what belongs to the others is not left over."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """As the source says."""
        return self.source.tensor(name, shape)

    def buffer(self, name: str) -> Tensor | None:
        """As the source says."""
        return self.source.buffer(name)

    def unused(self) -> list[str]:
        """Nothing."""
        return []


def compare(
    recipe: Recipe,
    plan: Plan,
    catalog: Mapping[str, Layer],
    family: Family,
    objective: Objective,
    device: torch.device,
    batch: Batch,
    model: Callable[[], nn.Module],
    weights: Callable[[nn.Module], Source],
    late: Callable[[bool], bool] = bool,
) -> Numerics:
    """Compare every layer of `plan` that changes numerics with the baseline, until the next would go beyond 20 s; what is left out is named.

    `model` makes the recipe's model on meta, `weights` the source to fill it from; `batch` is a batch on the device, of which the first
    sequence with something to learn is taken. `late` hears whether time is up and says whether it is for all ranks. Dropout draws nothing here.
    """
    began = perf_counter()
    asked = [
        choice
        for choice in plan.choices
        if choice.slot in COMPARED and catalog[choice.layer].changes_numerics and not catalog[choice.layer].baseline
    ]
    rows = len(next(iter(batch.values())))
    singles = ({key: value[row : row + 1] for key, value in batch.items()} for row in range(rows))
    # Where nothing in a sequence is learned, nothing would be compared.
    first = next((one for one in singles if float(objective.weight(one)) > 0), {key: value[:1] for key, value in batch.items()})

    def run(choices: tuple[Choice, ...]) -> tuple[float, list[Tensor]]:
        small = shortened(model(), family)
        made = replace(plan, choices=choices)
        with build_engine(
            small, family, copy.copy(objective), recipe, made, catalog, Ranks(World(), device), iter(()), _Part(weights(small))
        ) as engine:
            return _gradient(engine, first)

    if not asked:
        return Numerics((), (), 0.0)
    drawn = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    base = run(tuple(_baseline(slot, catalog) for slot in SLOTS))
    longest = perf_counter() - began
    done: list[Compared] = []
    for choice in asked:
        if late(perf_counter() - began + longest > SECONDS):
            break
        since = perf_counter()
        done.append(_compared(choice, base, run(alone(choice, plan, catalog)), plan, catalog))
        longest = max(longest, perf_counter() - since)
    torch.set_rng_state(drawn[0])
    if drawn[1] is not None:
        torch.cuda.set_rng_state(drawn[1], device)
    return Numerics(tuple(done), tuple(f"{one.slot}={one.layer}" for one in asked[len(done) :]), perf_counter() - began)


def shortened(model: nn.Module, family: Family) -> nn.Module:
    """`model` with its first blocks only, under the names that they have."""
    names = list(family.blocks(model))
    parent = names[0].rpartition(".")[0] if names else ""
    if len(names) > BLOCKS and isinstance(model.get_submodule(parent), nn.ModuleList):
        holder, _, name = parent.rpartition(".")
        whole = model.get_submodule(parent)
        setattr(model.get_submodule(holder), name, whole[:BLOCKS])  # type: ignore[index]
    return model


def alone(choice: Choice, plan: Plan, catalog: Mapping[str, Layer]) -> tuple[Choice, ...]:
    """Baselines everywhere but in the slot of `choice` and in those that its layer needs."""
    needed = {choice.slot, *(slot for slot in catalog[choice.layer].needs_slots if slot in COMPARED)}
    return tuple(plan.choice(slot) if slot in needed else _baseline(slot, catalog) for slot in SLOTS)


def _baseline(slot: str, catalog: Mapping[str, Layer]) -> Choice:
    layer = next(layer for layer in catalog.values() if layer.slot == slot and layer.baseline)
    return Choice(slot, layer.name, layer.read_options({}, "numerics"), "numerics")


def _gradient(engine: Engine, batch: Batch) -> tuple[float, list[Tensor]]:
    engine.model.train()
    for module in engine.bare.modules():
        if isinstance(module, dropout_type()):
            module.eval()  # what is drawn differs between kernels and dtypes that are otherwise the same
    # As in a step, the sum is divided by its weight: a scaler's range is made for that, not for a sum over tokens.
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
    cosine = dot / (one * two) ** 0.5 if one * two != 0 else float(one == two)  # what is no number stays none
    beside = [made.layer for made in alone(choice, plan, catalog)]
    kinds = [TOLERANCE[name] for name in beside if name in TOLERANCE] or [SAME]
    allowed = max(kind[0] for kind in kinds), min(kind[1] for kind in kinds)
    far = abs(its - loss) / max(abs(loss), 1e-30)
    return Compared(choice.slot, choice.layer, far, cosine, allowed, _baseline(choice.slot, catalog).layer)
