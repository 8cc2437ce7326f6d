"""Messages name what to type, and what they name helps: no alternative that was refused itself, no flag of another command."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptoughts import api
from gptoughts.cli import lists
from gptoughts.cli.generate import check_room
from gptoughts.config.model_path import resolve_model_folder
from gptoughts.errors import ConfigError, PlanError
from gptoughts.hardware.machine import read
from gptoughts.hardware.world import World
from gptoughts.inference.generate.write import check_sampling
from gptoughts.layers import CATALOG
from gptoughts.planning.profile import pick
from gptoughts.planning.resolve import resolve
from tests.support.engines import recipe_of, spec_for

MACHINES = Path(__file__).parents[1] / "machines"


def test_a_refused_alternative_is_no_way_out() -> None:
    """Three ranks cannot share a batch of 16: one process would, but `--layer.parallel ddp` is what was refused."""
    machine, recipe = read(MACHINES / "h100x8.json"), recipe_of("modern", train={"steps": 1, "global_batch": 16})
    with pytest.raises(PlanError) as raised:
        resolve(pick("auto", machine), machine, spec_for(recipe), recipe, World(0, 0, 3, 3), CATALOG)
    assert str(raised.value).splitlines()[-1] == "  Try: --train.global-batch 15 or 18, or --gpus 2"


def test_layers_stand_in_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """Every row is slot, layer and state, with a gap behind the longest name, too."""
    assert lists.layers(None, markdown=False) == 0
    rows = capsys.readouterr().out.splitlines()[: len(CATALOG)]
    longest = max(CATALOG, key=len)
    assert [row.split()[1] for row in rows if longest in row] == [longest]
    assert {row.split()[1] for row in rows} == set(CATALOG)


def test_without_a_network_there_is_a_line_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"\n  Try: --model.path FOLDER, or --model.config FILE to plan or train from random"):
        resolve_model_folder("nobody/nothing")


def denoising(tokens: int) -> Any:
    recipe = recipe_of("llada")
    return recipe.model_copy(update={"sample": recipe.sample.model_copy(update={"tokens": tokens})})


def test_too_many_new_tokens_name_the_flag_of_the_command() -> None:
    recipe = denoising(4096)
    length = recipe.data.sequence_length
    with pytest.raises(ConfigError, match=rf"sequence_length {length}\. Found 4096\.\n  Try: --sample.tokens {length}$"):
        check_sampling(recipe)
    with pytest.raises(ConfigError, match=rf"sequence_length {length}\. Found 4096\.\n  Try: --tokens {length}$"):
        check_room(SimpleNamespace(sequence_length=length), recipe, 3, [[1]], chat=False)


def test_the_line_in_the_plan_is_the_one_in_the_reason() -> None:
    """What a profile's first choice is passed over for is weighed as the plan's own memory line weighs it."""
    plan = api.plan("gpt2-124m", machine=str(MACHINES / "h100.json"))
    table = plan.table()
    assert plan.memory is not None and plan.memory.budget is not None
    logits = f"{plan.memory.budget.logits / 2**30:.2f} GiB"
    assert f"logits take {logits} of" in table and f"logits {logits}," in table
