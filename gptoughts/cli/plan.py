"""`gptoughts plan`: print the layers that a recipe gets, with reasons. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from gptoughts.api import decide
from gptoughts.console import print_result


def plan(
    recipe: str | None,
    profile: str,
    fields: Mapping[str, str],
    layers: Mapping[str, str],
    plugin: Sequence[str],
    machine: str | None,
    ranks: int | None,
    gpus: int | None,
    as_json: bool,
) -> int:
    """Print the plan as a table or as JSON."""
    setting = decide(
        recipe, profile, fields, layers, plugin, machine, ranks=ranks, gpus=gpus, every_gpu=True, only_planned=True
    )
    if as_json:
        print_result(json.dumps({"recipe": setting.resolved.recipe.name, **setting.plan.to_json()}, indent=1), raw=True)
        return 0
    print_result(f"recipe {setting.resolved.recipe.name}")
    print_result(setting.plan.table())
    if setting.probe_seconds is not None:
        print_result(f"probed this machine in {setting.probe_seconds:.2f} s")
    return 0
