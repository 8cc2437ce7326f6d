"""One rank of the bad-step tests: one rank's loss is infinite in one step; writes what each rank did, and whether copies of weights are compared."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch

from gptoughts.engine.distributed.process_group import process_group
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.distributed.replicas import demand_equal_weights
from gptoughts.engine.distributed.shards import local
from gptoughts.engine.engine import Engine
from gptoughts.engine.trainer import Progress, run_step
from gptoughts.errors import RunError
from gptoughts.hardware.world import World, world_from_environment
from gptoughts.inference.eval.perplexity import mean_loss
from gptoughts.run.step_check import StepCheck
from tests.support.ddp_worker import share
from tests.support.engines import engine_of, plan_of, recipe_of

BAD_STEP, BAD_RANK = 2, 1
PLANS: dict[str, dict[str, str]] = {
    "ddp": {"parallel": "ddp"},
    "ddp fused": {"parallel": "ddp", "optimizer": "fused"},
    "fsdp2": {"parallel": "fsdp2"},
    "fsdp2 fused": {"parallel": "fsdp2", "optimizer": "fused"},
    "hybrid": {"parallel": "fsdp2", "parallel.replicas": "2"},
}


def main(out: str) -> None:
    """Four steps by each plan and policy; then one weight changes on one rank."""
    world = world_from_environment(os.environ)
    record: dict[str, Any] = {}
    with process_group(world, torch.device("cpu")) as ranks:
        for name, layers in PLANS.items():
            record[name] = {
                "skip": train("skip", layers, world, ranks, Path(out)),
                "stop": train("stop", layers, world, ranks, Path(out)),
            }
    Path(out, f"rank{world.rank}.json").write_text(json.dumps(record), encoding="utf-8")


def train(policy: str, layers: dict[str, str], world: World, ranks: Ranks, out: Path) -> dict[str, Any]:
    """Which steps moved a weight or the state on this rank, how the run ended, and what a changed weight is told as."""
    recipe = recipe_of(train={"steps": 100, "global_batch": 4, "bad_step": policy})
    with engine_of(recipe, plan_of(recipe, layers, world), share(recipe, world), ranks) as engine:
        inner, at = engine.objective, {"step": 0}

        class Breaking(type(inner)):  # type: ignore[misc]
            """A loss that is infinite on one rank in one step, and whose gradient is finite."""

            def __call__(self, model: Any, batch: Any) -> torch.Tensor:
                loss = inner(model, batch)
                return loss + math.inf if (at["step"], world.rank) == (BAD_STEP, BAD_RANK) else loss

        engine.objective = Breaking()
        check, progress, moved, error = StepCheck(out), Progress(), [], ""
        engine.model.train()
        for step in range(4):
            at["step"] = step
            before = state_of(engine)
            progress, stats = run_step(engine, progress, lambda _: 1e-3)
            moved.append(any(not torch.equal(old, new) for old, new in zip(before, state_of(engine), strict=False)))
            try:
                check.on_step(engine, progress, stats, False)
            except RunError as found:
                error = f"{type(found).__name__} at {step}: {found}"
                break
        return {"moved": moved, "error": error, "counts": check.counts(), "changed": changed(engine, world)}


def state_of(engine: Engine) -> list[torch.Tensor]:
    """Copies of this rank's weights, then of its optimizer state."""
    assert engine.optimizer is not None
    values = list[torch.Tensor](engine.parameters())
    values += [value for held in engine.optimizer.state.values() for value in held.values()]
    return [local(value).detach().clone() for value in values]


def changed(engine: Engine, world: World) -> str:
    """What is told of copies of weights: of equal ones, of one changed on the last rank, and of equal ones after a validation."""
    told = _told(engine)
    weight = local(next(iter(engine.bare.parameters())))
    kept = weight.detach().clone()
    with torch.no_grad():
        if world.rank == world.world_size - 1:
            weight.view(-1)[0] += 0.25
        told += _told(engine)
        weight.copy_(kept)
    mean_loss(engine, [next(share(engine.recipe, world))[0]])
    return told + _told(engine)


def _told(engine: Engine) -> str:
    try:
        demand_equal_weights(engine)
    except RunError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main(sys.argv[1])
