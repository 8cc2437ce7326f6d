"""One rank of the optimizers' data-parallel test: two steps with every optimizer on its share of ragged batches."""

from __future__ import annotations

import os
import sys
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from gptoughts.config.recipe import OptimConfig
from gptoughts.engine.distributed.process_group import process_group
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.hardware.world import world_from_environment
from tests.support.ddp_worker import share
from tests.support.engines import engine_of, plan_of, recipe_of, steps

NAMES = get_args(OptimConfig.model_fields["name"].annotation)


def optim_of(name: str, **more: Any) -> dict[str, Any]:
    """A table [optim] for a model of a few thousand parameters."""
    own: dict[str, dict[str, Any]] = {
        "apollo": {"rank": 8, "projection_gap": 3},
        "apollo-mini": {"projection_gap": 3},
        "schedule-free": {"schedule": "constant"},
    }
    return {"name": name, "warmup_steps": 0, **own.get(name, {}), **more}


def reached(name: str, ranks: Ranks) -> dict[str, Tensor]:
    """Weights after two updates."""
    recipe = recipe_of("modern", optim=optim_of(name))
    parallel = "ddp" if ranks.size > 1 else "single"
    with engine_of(recipe, plan_of(recipe, {"parallel": parallel}, ranks.world), share(recipe, ranks.world), ranks) as engine:
        steps(engine, 2)
        return {f"{name}/{key}": parameter.detach().clone() for key, parameter in engine.bare.named_parameters()}


def main(out: str) -> None:
    """Every optimizer in turn; the ranks' own generators stand at different places."""
    world = world_from_environment(os.environ)
    weights: dict[str, Tensor] = {}
    with process_group(world, torch.device("cpu")) as ranks:
        torch.manual_seed(world.rank)
        for name in NAMES:
            weights |= reached(name, ranks)
    save_file(weights, f"{out}-{world.rank}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
