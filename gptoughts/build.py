"""From a plan to an engine, in three moments: the process, the model's shape on meta, the real weights. Undo runs backwards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gptoughts.balance import balanced
from gptoughts.config import ModelConfig, Recipe
from gptoughts.distributed import Ranks
from gptoughts.engine import Engine, Source
from gptoughts.errors import GptoughtsError, LayerError
from gptoughts.layer import Layer, Moment
from gptoughts.models.family import Family, draw
from gptoughts.models.meta import on_meta
from gptoughts.objectives import Objective
from gptoughts.planner import Plan


class Initialisation:
    """Fresh weights: a pure function of (seed, native name, full shape), the same on every rank."""

    def __init__(self, family: Family, config: ModelConfig, seed: int) -> None:
        self._family, self._config, self._seed = family, config, seed

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """The first value of the parameter `name`."""
        assert self._family.initial is not None
        return draw(self._seed, name, shape, self._family.initial(name, shape, self._config))

    def buffer(self, name: str) -> Tensor | None:
        """Buffers stay as they were built."""
        return None

    def unused(self) -> list[str]:
        """Nothing is left over: values are drawn when asked for."""
        return []


class AsTheyAre:
    """A user's own model: its parameters keep the values that they have."""

    def __init__(self, model: nn.Module) -> None:
        self._values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """The value that the parameter had."""
        return self._values.get(name)

    def buffer(self, name: str) -> Tensor | None:
        """Buffers stay as they were built."""
        return None

    def unused(self) -> list[str]:
        """Nothing is left over."""
        return []


def meta_model(recipe: Recipe, family: Family, rows: int) -> nn.Module:
    """The recipe's model without memory, over `rows` embedding rows."""
    with on_meta():
        return family.build(recipe.model, rows, recipe.data.sequence_length)


def seed_generators(seed: int, rank: int, step: int) -> None:
    """Seed torch's generators, which only dropout draws from: a pure function of the recipe's seed, the rank and the step."""
    digest = hashlib.sha256(f"{seed}:{rank}:{step}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@contextmanager
def built(
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
    engine = Engine(model, family, objective, recipe, ranks, ranks.device, batches)
    with ExitStack() as stack:
        if recipe.model.family == "hf":  # dense models come back as they are
            # Under an adapter the base stays as it is, its routing bias with it: an adapter's folder could not hold a moved one.
            fixed = {"bias_rate": 0.0} if recipe.adapter.kind != "none" else {}
            engine.objective, undo = balanced(engine, objective, recipe.experts.model_copy(update=fixed))
            stack.callback(undo)
        for moment in Moment:
            if moment is Moment.REAL:
                engine.materialise(source)
            for choice in plan.choices:
                layer = catalog[choice.layer]
                if layer.when is moment:
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
