"""One rank of the data-parallel tests: trains on its share of given batches and writes losses, gradient and weights."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import save_file

from gptoughts.config.loader import Recipe
from gptoughts.engine.distributed.process_group import process_group
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.hardware.world import World, world_from_environment
from gptoughts.layers import CATALOG
from gptoughts.planning.layer import Status
from tests.support.engines import engine_of, plan_of, random_batches, recipe_of, steps, watched


def share(recipe: Recipe, world: World) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    """This rank's rows of each ragged global batch."""
    rows = recipe.train.global_batch // world.world_size
    for batch, number in random_batches(recipe, ragged=True):
        yield {key: value[world.rank * rows : (world.rank + 1) * rows] for key, value in batch.items()}, number


FAMILIES = ("modern", "llada", "llama", "deepseek")


def main(out: str, *families: str) -> None:
    """Two steps that are compared, then one that is watched, for a model of each family."""
    world = world_from_environment(os.environ)
    with process_group(world, torch.device("cpu")) as ranks:
        for family in families:
            train(family, f"{out}-{family}", world, ranks)


def train(family: str, out: str, world: World, ranks: Ranks) -> None:
    """One family; rank 0 writes what came of it."""
    recipe = recipe_of(family)
    layers: dict[str, Any] = {
        "parallel": "ddp" if world.world_size > 1 else "single",
        "microbatch": "fixed",
        "microbatch.sequences": 1,
    }
    plan = plan_of(recipe, layers, world)
    ranks.same("the plan", plan.digest())
    with engine_of(recipe, plan, share(recipe, world), ranks) as engine:
        losses = steps(engine, 2)
        weights = {name: parameter.detach().clone() for name, parameter in engine.bare.named_parameters()}
        record: dict[str, Any] = {"losses": losses}
        if world.world_size > 1:
            layer = CATALOG["ddp"]
            trace = watched(engine, 0)
            proof = layer.verify(engine, trace, {})
            record["proof"] = [proof.status is Status.ACTIVE, proof.text]
            with torch.no_grad():  # a rank that went its own way must be told
                next(engine.bare.parameters()).add_(float(world.rank))
            record["negative"] = layer.verify(engine, trace, {}).status is Status.INACTIVE
    if world.rank == 0:
        save_file(weights, f"{out}.safetensors")
        with open(f"{out}.json", "w", encoding="utf-8") as file:
            json.dump(record, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
