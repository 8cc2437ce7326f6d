"""A step without a label, a finite loss or a finite gradient that is left out: every bit of weights and state is as if its batch were not there."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoughts.engine.engine import Engine
from gptoughts.engine.optim.update import is_fused
from gptoughts.engine.trainer import Progress, run_step
from tests.support.engines import engine_of, plan_of, random_batches, recipe_of

SKIP = {"steps": 100, "global_batch": 4, "bad_step": "skip"}
GOOD, BAD = 3, 2
"""Good batches before the bad one, bad ones in a row."""


def batches(recipe: Any, bad: int, kind: str) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    """The same good batches with `bad` more of them after the third, without labels or of a loss that is not finite."""
    for number, (batch, _) in enumerate(random_batches(recipe, ragged=True)):
        if number == GOOD:
            for _ in range(bad):
                wrong = {**batch, "bad": torch.ones(len(batch["input_ids"]))}
                if kind == "label":
                    wrong = {**batch, "labels": torch.full_like(batch["labels"], -100)}
                yield wrong, 0
        yield batch, number


def break_loss(engine: Engine, factor: float) -> None:
    """Multiply the loss of a bad batch by `factor`; the gradient too, unless it is the loss alone that is not finite."""
    inner = engine.objective

    class Breaking(type(inner)):  # type: ignore[misc]
        def __call__(self, model: Any, batch: Any) -> torch.Tensor:
            loss = inner(model, {key: value for key, value in batch.items() if key != "bad"})
            if "bad" not in batch:
                return loss
            return loss * factor if math.isnan(factor) else loss + factor

    engine.objective = Breaking.__new__(Breaking)
    engine.objective.__dict__.update(inner.__dict__)


def state_of(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of all weights, buffers and optimizer values."""
    assert engine.optimizer is not None
    found = {name: value.detach().clone() for name, value in engine.bare.state_dict().items()}
    for number, values in enumerate(engine.optimizer.state.values()):
        for key, value in values.items():
            found[f"{number}/{key}"] = torch.as_tensor(value).detach().clone()
    return found


def trained(optim: dict[str, Any], layers: dict[str, Any], bad: int, kind: str) -> dict[str, torch.Tensor]:
    """The state after `GOOD + 2` good steps at one learning rate, with `bad` bad ones among them."""
    recipe = recipe_of(optim={"warmup_steps": 0, **optim}, train=SKIP)
    with engine_of(recipe, plan_of(recipe, layers), batches(recipe, bad, kind)) as engine:
        break_loss(engine, math.nan if kind == "gradient" else math.inf)
        engine.model.train()
        progress = Progress()
        for number in range(GOOD + 2 + bad):
            before = state_of(engine)
            progress, _ = run_step(engine, progress, lambda _: 1e-3)
            assert engine.usable is not None
            wrong = GOOD <= number < GOOD + bad
            assert bool(engine.usable) is not wrong
            after = state_of(engine)
            assert all(torch.equal(before[name], after[name]) for name in before) is wrong
            assert all(parameter.grad is None for parameter in engine.parameters())
        assert progress.step == GOOD + 2 + bad
        assert is_fused(engine.optimizer) is (layers.get("optimizer") == "fused")  # type: ignore[arg-type]
        return state_of(engine)


@pytest.mark.parametrize("kind", ["label", "loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["plain", "fused", "muon"])
def test_a_bad_step_that_is_left_out_leaves_every_bit(optimizer: str, kind: str) -> None:
    """`loss`: infinite, with a gradient that is finite. The fused optimizer decides on the device."""
    optim = {"name": "muon"} if optimizer == "muon" else {}
    layers = {"optimizer": "fused" if optimizer == "fused" else "plain"}
    undisturbed, disturbed = trained(optim, layers, 0, kind), trained(optim, layers, BAD, kind)
    assert undisturbed.keys() == disturbed.keys()
    assert all(torch.equal(undisturbed[name], disturbed[name]) for name in undisturbed)


def test_the_other_policies_update_and_so_does_a_good_step() -> None:
    recipe = recipe_of()
    with engine_of(recipe, plan_of(recipe), batches(recipe, 1, "label")) as engine:
        break_loss(engine, math.nan)
        progress = Progress()
        for _ in range(GOOD + 1):
            before = copy.deepcopy(engine.bare.state_dict())
            progress, _ = run_step(engine, progress, lambda _: 1e-3)
            moved = [name for name, value in engine.bare.state_dict().items() if not torch.equal(before[name], value)]
            assert moved
        assert engine.usable is not None and not engine.usable  # read by the step check, which ends the run


@pytest.mark.slow
def test_one_ranks_infinite_loss_leaves_the_update_out_on_all_ranks_or_ends_them_at_one_step(tmp_path: Path) -> None:
    """Also: a weight that changes on one rank is told with the ranks, where ranks hold copies; shards alone have none."""
    root = Path(__file__).parents[2]
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "tests.support.bad_step_worker",
        str(tmp_path),
    ]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    ran = subprocess.run(
        [sys.executable, *words], cwd=root, env=variables, capture_output=True, text=True, check=False, timeout=400
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    for plan in found[0]:
        for rank in (0, 1):
            left_out, ended = found[rank][plan]["skip"], found[rank][plan]["stop"]
            assert left_out["moved"] == [True, True, False, True] and left_out["error"] == "", (plan, left_out)
            assert left_out["counts"]["train/bad_steps"] == 1
            assert ended["moved"] == [True, True, True]
            kind = "RunError at 2: step 3: loss or gradient norm is not finite" if rank == 0 else "ToldElsewhere at 2: "
            assert ended["error"].startswith(kind), (plan, ended)
            for changed in (left_out["changed"], ended["changed"]):
                if plan.startswith("fsdp2"):
                    assert changed == ""
                else:
                    told = r"weights: 1 of \d+ differ between ranks, .* Found embed.weight: rank 0 \| rank 1\."
                    assert re.match(told, changed), (plan, changed)
    assert {path.name for path in tmp_path.glob("bad-step*")} == {f"bad-step-000003-rank{rank}.safetensors" for rank in (0, 1)}
