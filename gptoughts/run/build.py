"""Build the engine of a plan in three phases: process, model on meta, real weights. Layers are undone in reverse order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from gptoughts.config.loader import Recipe
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine, Source
from gptoughts.engine.moe_balance import add_balance_loss
from gptoughts.engine.objectives.base import Objective
from gptoughts.errors import GptoughtsError, LayerError, PlanError
from gptoughts.hardware.machine import Machine
from gptoughts.hardware.world import World
from gptoughts.models.family import Family
from gptoughts.planning.layer import Layer, Phase
from gptoughts.planning.resolve import Plan


def select_device(machine: Machine, world: World) -> torch.device:
    """Return this rank's GPU, or the CPU if the plan has no GPU. Raises PlanError if this torch cannot use the GPU."""
    if not machine.gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise PlanError(
            f"torch {torch.__version__}: sees no GPU, and the plan is for {machine.label()}",
            fix="gptoughts doctor, which names the build that fits the driver, or CUDA_VISIBLE_DEVICES= to train on the CPU",
        )
    device = torch.device("cuda", world.local_rank % len(machine.gpus))  # a rank may see its own GPU alone
    torch.cuda.set_device(device)
    return device


def seed_rngs(seed: int, rank: int, step: int) -> None:
    """Seed torch's generators, which only dropout uses, from the recipe's seed, the rank and the step."""
    digest = hashlib.sha256(f"{seed}:{rank}:{step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@contextmanager
def build_engine(
    model: nn.Module,
    family: Family,
    objective: Objective,
    recipe: Recipe,
    plan: Plan,
    catalog: Mapping[str, Layer],
    *,
    ranks: Ranks,
    batches: Iterator[tuple[Any, Any]],
    source: Source,
) -> Iterator[Engine]:
    """Build the engine of `plan`; on exit, undo every layer in reverse order. Exceptions in the block reach the layers.

    Raises LayerError for a layer that could not be applied, RunError if `source` does not match the model.
    """
    engine = Engine(model, family, objective, recipe, ranks, ranks.device, batches=batches)
    with ExitStack() as stack:
        if recipe.model.family == "hf":  # does nothing for dense models
            # With an adapter the routing bias is frozen like the base: an adapter folder cannot store it.
            fixed = {"bias_rate": 0.0} if recipe.adapter.kind != "none" else {}
            engine.objective, undo = add_balance_loss(engine, objective, recipe.experts.model_copy(update=fixed))
            stack.callback(undo)
        for phase in Phase:
            if phase is Phase.REAL:
                engine.materialize(source)
            for choice in plan.choices:
                layer = catalog[choice.layer]
                if layer.when is phase:
                    _enter(stack, layer, engine, choice.options)
        yield engine


def _enter(stack: ExitStack, layer: Layer, engine: Engine, options: Mapping[str, Any]) -> None:
    """Apply `layer` for the lifetime of `stack`. Raises LayerError if it cannot be applied."""
    try:
        stack.enter_context(layer.apply(engine, options))
    except GptoughtsError:
        raise
    except Exception as error:
        raise LayerError(f"{layer.slot}={layer.name}: could not be applied: {type(error).__name__}: {error}") from error
