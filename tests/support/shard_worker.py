"""One rank of the sharding tests: trains on its share of given batches with layers of the parallel slot, and writes what came of it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gptoughts.engine.distributed.process_group import process_group
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.distributed.shards import whole
from gptoughts.engine.engine import Engine
from gptoughts.hardware.world import World, world_from_environment
from gptoughts.layers import CATALOG
from gptoughts.planning.layer import Status
from gptoughts.run.evidence import judge
from tests.support.ddp_worker import share
from tests.support.engines import engine_of, plan_of, recipe_of, steps, watched


def main(out: str, jobs: str) -> None:
    """Run each job of a JSON list: {"name", "family", "layers", "recipe", "one_rank"}; a single process trains without the parallel
    layer unless `one_rank` says that it is one rank.
    """
    world = world_from_environment(os.environ)
    made: dict[str, Path] = {}
    with process_group(world, torch.device("cpu")) as ranks:
        for job in json.loads(jobs):
            target = Path(out) / f"{job['name']}-{world.world_size}"
            same = json.dumps([job["family"], job["recipe"], layers_of(job, world), job.get("one_rank")], sort_keys=True)
            if same in made:  # one process alone trains what several ways of sharding are compared with
                for ending in ("json", "safetensors"):
                    os.link(f"{made[same]}.{ending}", f"{target}.{ending}")
            else:
                run(job, target, world, ranks)
            made[same] = target


def layers_of(job: Mapping[str, Any], world: World) -> dict[str, Any]:
    """The layers that a job asks of this world: a single process trains without the parallel layer."""
    layers = {"microbatch": "fixed", "microbatch.sequences": 1, **job["layers"]}
    if world.world_size == 1 and not job.get("one_rank"):
        layers = {key: value for key, value in layers.items() if not key.startswith("parallel")}
    return layers


def run(job: Mapping[str, Any], out: Path, world: World, ranks: Ranks) -> None:
    """Two steps whose losses and weights are compared, and one that is watched; rank 0 writes them."""
    recipe = recipe_of(job["family"], **job.get("recipe", {}))
    plan = plan_of(recipe, layers_of(job, world), world)
    with engine_of(recipe, plan, share(recipe, world), ranks) as engine:
        record: dict[str, Any] = {"losses": steps(engine, 2)}
        weights = {name: whole(parameter.detach()).clone() for name, parameter in engine.bare.named_parameters()}
        if world.world_size > 1 or job.get("one_rank"):
            trace = watched(engine, 0)
            lines = judge(engine, plan, CATALOG, trace)
            proof = next(line.evidence for line in lines if line.slot == "parallel")
            record |= {"status": str(proof.status), "proof": proof.text, "figures": dict(proof.figures)}
            record["inactive"] = [
                f"{line.layer}: {line.evidence.text}" for line in lines if line.evidence.status is not Status.ACTIVE
            ]
            record["negative"] = negatives(engine, trace, plan)
    if world.rank == 0:
        save_file(weights, f"{out}.safetensors")
        Path(f"{out}.json").write_text(json.dumps(record), encoding="utf-8")


def negatives(engine: Engine, trace: Any, plan: Any) -> dict[str, bool]:
    """Whether the proof says no where the sharding is not what it seems."""
    choice = plan.choice("parallel")

    def refused() -> bool:
        return CATALOG[choice.layer].verify(engine, trace, choice.options).status is Status.INACTIVE

    assert engine.optimizer is not None
    groups = engine.optimizer.param_groups
    kept = [group["params"] for group in groups]
    for group in groups:  # as if the optimizer had been made before sharding
        group["params"] = [torch.nn.Parameter(torch.zeros(parameter.shape)) for parameter in group["params"]]
    early = refused()
    for group, parameters in zip(groups, kept, strict=True):
        group["params"] = parameters
    found = {"optimizer made before sharding": early}
    if choice.layer.startswith("zero"):
        started, engine.optimizer = engine.optimizer, torch.optim.AdamW(engine.parameters())
        found["no sharding"] = refused()
        engine.optimizer = started
    return {**found, "restored": not refused()}


if __name__ == "__main__":
    main(*sys.argv[1:])
