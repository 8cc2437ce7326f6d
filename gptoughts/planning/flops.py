"""FLOPs per trained token of a plan: of the model (MFU), and of the hardware (HFU), which also counts recomputed forwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gptoughts.config.loader import Recipe
from gptoughts.config.model_spec import ModelSpec, attention_flops, flops_per_token, matmul_parameters
from gptoughts.config.tasks import task_of
from gptoughts.planning.layer import Layer
from gptoughts.planning.memory_model import adapter_parameters
from gptoughts.planning.plan import Plan


@dataclass(frozen=True)
class Flops:
    """FLOPs per token, forward and backward, and the formula of `model`. None if a size is unknown."""

    model: int | None
    hardware: int | None
    formula: str


def model_flops(spec: ModelSpec, recipe: Recipe) -> tuple[int | None, str]:
    """Return the model's FLOPs per token and their formula.

    Frozen weights take 2 operations in the forward and 2 for the gradient of their input, and have no gradient of their own. With
    `adapter.targets` below all-linear, the adapter's share, about a per cent, is counted too high.
    """
    everything, weights = flops_per_token(spec), matmul_parameters(spec)
    if recipe.adapter.kind == "none" or everything is None or weights is None:
        return everything, "6N + 12LCT"
    return everything - 2 * weights + 6 * adapter_parameters(spec, recipe), "4N + 6A + 12LCT"


def plan_flops(spec: ModelSpec, recipe: Recipe, plan: Plan, catalog: Mapping[str, Layer]) -> Flops:
    """Return the FLOPs per token of a plan. Hardware FLOPs add the forwards of blocks that its layers run again in the backward."""
    model, formula = model_flops(spec, recipe)
    weights, attention = matmul_parameters(spec), attention_flops(spec)
    if model is None or weights is None or attention is None or spec.vocab_size is None or spec.width is None:
        return Flops(None, None, formula)
    in_blocks = weights - (spec.vocab_size * spec.width if task_of(recipe).over_vocabulary else 0)
    again = 0.0
    for choice in plan.choices:
        matmuls, attentions = catalog[choice.layer].recomputes(spec, choice.options)
        again += 2 * in_blocks * matmuls + attention / 3 * attentions
    return Flops(model, model + round(again), formula)
