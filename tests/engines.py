"""Small real engines for the tests: a recipe, a plan for this machine, and an engine that can step."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from gptoughts import prove
from gptoughts.build import Initialisation, built, meta_model
from gptoughts.config import Recipe, from_values
from gptoughts.distributed import Ranks
from gptoughts.engine import Engine
from gptoughts.facts import facts_for
from gptoughts.layer import Sight
from gptoughts.layers import CATALOG
from gptoughts.machine import Machine, World, probe
from gptoughts.models.family import FAMILIES
from gptoughts.objectives import NextToken
from gptoughts.planner import Plan, resolve
from gptoughts.profile import Match, Profile
from gptoughts.trainer import Progress, advance

NEEDS_INDUCTOR = pytest.mark.skipif(
    " " in sys.prefix, reason="torch's inductor does not quote paths for the linker, and this environment's path holds a space"
)
"""For tests that compile with inductor."""

ROWS, LENGTH, BATCH = 128, 32, 4
FAMILIES_UNDER_TEST = {
    "modern": {"depth": 3, "width": 64, "heads": 4, "kv_heads": 2},
    "gpt2": {
        "depth": 3, "width": 64, "heads": 4, "norm": "layernorm", "positions": "learned", "mlp": "gelu", "qk_norm": False, "bias": True,
    },
}  # fmt: skip


def recipe_of(family: str = "modern", **more: Any) -> Recipe:
    """A recipe of a few thousand parameters."""
    values = {
        "name": "tiny",
        "model": {**FAMILIES_UNDER_TEST[family], "vocab_size": ROWS},
        "data": {"sequence_length": LENGTH, "tokenizer": "chars"},
        "train": {"steps": 100_000, "global_batch": BATCH},
        "optim": {"warmup_steps": 0, "learning_rate": 1e-3},
    }
    return from_values({**values, **more}, "the test").recipe


def plan_of(
    recipe: Recipe, layers: Mapping[str, Any] | None = None, world: World | None = None, machine: Machine | None = None
) -> Plan:
    """A plan of baselines, with `layers` demanded."""
    bare = Profile("bare", "", False, Match(), {}, "the test")
    return resolve(bare, machine or probe(), facts_for(recipe), recipe, world or World(), CATALOG, layers)


def random_batches(recipe: Recipe, ragged: bool = False, seed: int = 0) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    """Endless batches; ragged ones ignore a different number of labels in every row."""
    generator = torch.Generator().manual_seed(seed)
    number = 0
    while True:
        number += 1
        ids = torch.randint(0, ROWS, (recipe.train.global_batch, LENGTH + 1), generator=generator)
        batch = {"input_ids": ids}
        if ragged:
            kept = torch.randint(1, LENGTH, (recipe.train.global_batch, 1), generator=generator)
            batch["labels"] = ids.masked_fill(torch.arange(LENGTH + 1) > kept, -100)
        yield batch, number


@contextmanager
def engine_of(recipe: Recipe, plan: Plan, batches: Iterator[Any] | None = None, ranks: Ranks | None = None) -> Iterator[Engine]:
    """The engine of `plan` on this CPU."""
    family = FAMILIES[recipe.model.family]
    model = meta_model(recipe, family, ROWS)
    source = Initialisation(family, recipe.model, recipe.seed)
    here = ranks or Ranks(World(), torch.device("cpu"))
    stream = batches or random_batches(recipe)
    with built(model, family, NextToken(), recipe, plan, CATALOG, here, stream, source) as engine:
        yield engine


def steps(engine: Engine, count: int) -> list[float]:
    """Losses of `count` updates."""
    losses = []
    progress = Progress()
    engine.model.train()
    for _ in range(count):
        progress, stats = advance(engine, progress, lambda _: 1e-3)
        losses.append(float(engine.ranks.sum(stats.loss_sum) / stats.weight))
    return losses


def watched(engine: Engine, warm: int = 1) -> Sight:
    """What the profiler sees of one step after `warm` others."""
    steps(engine, warm)
    return prove.watch(engine, lambda: steps(engine, 1) and None)
