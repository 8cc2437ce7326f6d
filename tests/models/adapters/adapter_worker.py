"""One rank of the data-parallel adapter test: trains on its part of ragged batches, with a packed base."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from safetensors.torch import save_file

from gptoughts.config.recipe import AdapterConfig
from gptoughts.engine.distributed.process_group import process_group
from gptoughts.hardware.world import world_from_environment
from gptoughts.layers import CATALOG
from gptoughts.models.adapters.adapter import is_trained
from gptoughts.planning.layer import Status
from tests.models.adapters.adapters import adapted_engine, weights
from tests.support.ddp_worker import share
from tests.support.engines import plan_of, recipe_of, steps, watched


def main(out: str) -> None:
    """Run two compared steps, then a watched one."""
    world, recipe = world_from_environment(os.environ), recipe_of()
    layers: dict[str, Any] = {"microbatch": "fixed", "microbatch.sequences": 1}
    layers["parallel"] = "ddp" if world.world_size > 1 else "single"
    adapter = AdapterConfig(kind="dora", rank=4, alpha=8.0, base="nf4")
    with process_group(world, torch.device("cpu")) as ranks:
        plan, batches = plan_of(recipe, layers, world), share(recipe, world)
        with adapted_engine(adapter, plan=plan, batches=batches, ranks=ranks) as engine:
            before = weights(engine.bare)
            record: dict[str, Any] = {"losses": steps(engine, 2)}
            after = weights(engine.bare)
            record["moved"] = sorted(name for name, value in after.items() if not torch.equal(value, before[name]))
            record["trained"] = sorted(name for name in after if is_trained(name))
            if world.world_size > 1:
                record["proven"] = CATALOG["ddp"].verify(engine, watched(engine, 0), {}).status is Status.ACTIVE
    if world.rank == 0:
        save_file({name: after[name] for name in record["trained"]}, f"{out}.safetensors")
        with open(f"{out}.json", "w", encoding="utf-8") as file:
            json.dump(record, file)


if __name__ == "__main__":
    main(sys.argv[1])
