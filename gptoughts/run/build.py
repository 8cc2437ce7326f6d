"""From a plan to an engine, in three moments: the process, the model's shape on meta, the real weights. Undo runs backwards."""

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
from gptoughts.engine.moe_balance import balanced
from gptoughts.engine.objectives.base import Objective
from gptoughts.errors import GptoughtsError, LayerError
from gptoughts.models.family import Family
from gptoughts.planning.layer import Layer, Phase
from gptoughts.planning.resolve import Plan


def seed_rngs(seed: int, rank: int, step: int) -> None:
    """Seed torch's generators, which only dropout draws from: a pure function of the recipe's seed, the rank and the step."""
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
    ranks: Ranks,
    batches: Iterator[tuple[Any, Any]],
    source: Source,
) -> Iterator[Engine]:
    """The engine of `plan`, ready to step. On leaving, every layer is undone in reverse order.

    Raises LayerError naming the layer that could not be applied, RunError where `source` does not fit the model.
    """
    engine = Engine(model, family, objective, recipe, ranks, ranks.device, batches=batches)
    with ExitStack() as stack:
        if recipe.model.family == "hf":  # dense models come back as they are
            # Under an adapter the base stays as it is, its routing bias with it: an adapter's folder could not hold a moved one.
            fixed = {"bias_rate": 0.0} if recipe.adapter.kind != "none" else {}
            engine.objective, undo = balanced(engine, objective, recipe.experts.model_copy(update=fixed))
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
    applied = layer.apply(engine, options)
    try:
        applied.__enter__()
    except GptoughtsError:
        raise
    except Exception as error:
        raise LayerError(f"{layer.slot}={layer.name} could not be applied: {type(error).__name__}: {error}") from error
    # Left as if nothing had happened inside, so that what stands below a layer's yield runs after an error, too.
    stack.callback(applied.__exit__, None, None, None)
