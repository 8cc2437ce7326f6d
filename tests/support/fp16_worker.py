"""One rank of fp16 under data parallelism: one rank's gradient overflows in one step; writes which steps each rank took."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from gptoughts.engine.distributed.process_group import process_group
from gptoughts.engine.trainer import Progress, run_step
from gptoughts.hardware.world import world_from_environment
from tests.support.ddp_worker import share
from tests.support.engines import engine_of, plan_of, recipe_of

POISONED_STEP, POISONED_RANK = 1, 1


def main(out: str) -> None:
    """Three steps in two micro-batches each; the second one's first loss is infinite on one rank."""
    world = world_from_environment(os.environ)
    with process_group(world, torch.device("cpu")) as ranks:
        recipe = recipe_of("modern")
        layers = {"precision": "fp16", "parallel": "ddp", "microbatch": "fixed", "microbatch.sequences": 1}
        with engine_of(recipe, plan_of(recipe, layers, world), share(recipe, world), ranks) as engine:
            at = {"step": -1}

            def overflow(inner: Any, loss: torch.Tensor) -> None:
                inner(loss * (float("inf") if at["step"] == POISONED_STEP and world.rank == POISONED_RANK else 1.0))

            engine.wrap("backward", overflow)
            engine.model.train()
            progress, updated = Progress(), []
            for _ in range(3):
                at["step"] += 1
                progress, stats = run_step(engine, progress, lambda _: 1e-3)
                updated.append(stats.updated)
            total = sum(float(parameter.detach().double().sum()) for parameter in engine.parameters())
            record = {"updated": updated, "scale": engine.extras["fp16"].scale, "weights": total}
    with open(f"{out}-{world.rank}.json", "w", encoding="utf-8") as file:
        json.dump(record, file)


if __name__ == "__main__":
    main(sys.argv[1])
