"""One rank of the rendezvous tests: opens a corpus with a slow tokenizer, then a process group, and compares texts with the others."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import torch

from gptoughts.data.text import tokenize
from gptoughts.data.text.shards import INDEX
from gptoughts.engine.distributed.process_group import process_group
from gptoughts.errors import RunError
from gptoughts.hardware.world import world_from_environment
from gptoughts.run.session import open_data
from tests.support.engines import recipe_of

made = tokenize.tokenize


def main() -> None:
    """Write what this rank saw into rank<N>.json."""
    world, seen = world_from_environment(os.environ), {"tokenized": 0, "equal": True, "said": None, "code": 0}

    def slow(*arguments: Any, **keywords: Any) -> Any:
        if not (arguments[2] / INDEX).exists():  # otherwise it returns what is there
            seen["tokenized"] += 1  # type: ignore[operator]
            time.sleep(float(os.environ["SLOW"]))
        return made(*arguments, **keywords)

    tokenize.tokenize = slow
    data = {"path": "text.txt", "cache": "cache", "tokenizer": "bytes", "sequence_length": 16}
    recipe = recipe_of("modern")
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})
    open_data(recipe, world)
    with process_group(world, torch.device("cpu")) as ranks:
        seen["sum"] = ranks.sum(1.0).item()
        ranks.same("the recipe", "one text")
        try:
            ranks.same("the plan", f"digest {world.rank}", f"table of {world.rank}\nsecond line")
        except RunError as error:
            seen |= {"said": str(error), "code": error.exit_code}
    with open(f"rank{world.rank}.json", "w", encoding="utf-8") as file:
        json.dump({**seen, "launcher": world.launcher}, file)


if __name__ == "__main__":
    main()
