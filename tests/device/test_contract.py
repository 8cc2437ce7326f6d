"""On a GPU: every layer that fits it is seen at work on a small GPT, undone without a trace, and not seen where it is not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoughts import prove
from gptoughts.build import Initialisation, built, meta_model
from gptoughts.config import Recipe
from gptoughts.distributed import Ranks
from gptoughts.engine import Engine
from gptoughts.errors import PlanError
from gptoughts.facts import facts_for
from gptoughts.layer import Layer, Sight, Status
from gptoughts.layers import CATALOG
from gptoughts.machine import World, probe
from gptoughts.models.family import FAMILIES
from gptoughts.objectives import NextToken
from gptoughts.planner import Plan, resolve
from gptoughts.profile import Match, Profile
from gptoughts.trainer import Progress, advance

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
ROWS, LENGTH, BATCH = 512, 128, 8
OPTIONS = {"fixed": {"microbatch.sequences": "2"}}  # without it the whole batch fits one forward, as on the baseline
LAYERS = [layer for layer in CATALOG.values() if not layer.baseline]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_GPU and "DEVICE_ON_CPU" not in os.environ, reason="no NVIDIA GPU"),
]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """Large enough for the fused kernels: head width 64, widths that are multiples of 16."""
    return Recipe.model_validate(
        {
            "name": "contract",
            "model": {"depth": 2, "width": 256, "heads": 4, "kv_heads": 2, "vocab_size": ROWS},
            "data": {"sequence_length": LENGTH, "tokenizer": "chars"},
            "train": {"steps": 1000, "global_batch": BATCH},
            "optim": {"warmup_steps": 0},
        }
    )


def batches() -> Iterator[tuple[dict[str, Any], int]]:
    """Arrays as the shards give them, the same at every call."""
    generator, number = torch.Generator().manual_seed(0), 0
    while True:
        number += 1
        ids = torch.randint(0, ROWS, (BATCH, LENGTH + 1), generator=generator).to(torch.uint16)
        yield {"input_ids": ids.numpy()}, number


def plan_of(recipe: Recipe, layers: dict[str, str]) -> Plan:
    """Baselines with `layers` demanded, and what those need in other slots."""
    for layer in [CATALOG[name] for name in list(layers.values())]:
        needed = {slot: allowed[0] for slot, allowed in layer.needs_slots.items()}
        layers = {**needed, **layers, **OPTIONS.get(layer.name, {})}
    bare = Profile("bare", "", False, Match(), {}, "the test")
    return resolve(bare, probe(), facts_for(recipe), recipe, World(), CATALOG, layers, dict(os.environ))


@contextmanager
def engine_of(recipe: Recipe, plan: Plan) -> Iterator[Engine]:
    """The engine of `plan` on the device."""
    family = FAMILIES[recipe.model.family]
    source = Initialisation(family, recipe.model, recipe.seed)
    model = meta_model(recipe, family, ROWS)
    ranks = Ranks(World(), DEVICE)
    with built(model, family, NextToken(), recipe, plan, CATALOG, ranks, batches(), source) as engine:
        yield engine


def watched(engine: Engine, warm: int) -> Sight:
    """One real step after `warm` others, the first of which compiles."""
    engine.model.train()
    progress = Progress()
    for _ in range(max(1, warm)):
        progress, _ = advance(engine, progress, lambda _: 1e-3)
    return prove.watch(engine, lambda: advance(engine, progress, lambda _: 1e-3) and None)


def keep(layer: Layer, seen: dict[str, Any]) -> None:
    """Add one layer's row to the file that the stage writes."""
    if "DEVICE_OUT" not in os.environ:
        return
    path = Path(os.environ["DEVICE_OUT"])
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**rows, layer.name: seen}, indent=1) + "\n", encoding="utf-8")


def held(layer: Layer) -> bool:
    """Whether an earlier session has already shown this layer at work."""
    path = Path(os.environ.get("DEVICE_OUT", ""))
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get(layer.name, {}).get("passed", False)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_layer_is_seen_is_undone_and_is_missed(layer: Layer, recipe: Recipe) -> None:
    if held(layer):
        pytest.skip("passed before")
    try:
        plan = plan_of(recipe, {layer.slot: layer.name})
    except PlanError as error:
        keep(layer, {"refused": str(error)})
        pytest.skip(str(error).splitlines()[1].strip())
    baseline = plan_of(recipe, {})
    with engine_of(recipe, plan) as engine:
        options = plan.choice(layer.slot).options
        sight = watched(engine, layer.warm_steps)
        evidence = layer.verify(engine, sight, options)
        keep(layer, {"status": str(evidence.status), "proof": evidence.text, "figures": dict(evidence.figures)})
        assert evidence.status is Status.ACTIVE, evidence.text
        model, keys = engine.bare, list(engine.bare.state_dict())
    if not layer.permanent:
        with engine_of(recipe, baseline) as plain:
            assert list(plain.bare.state_dict()) == keys
            assert [type(module) for module in model.modules()] == [type(module) for module in plain.bare.modules()]
            assert all(module._compiled_call_impl is None for module in model.modules())
    row = {"passed": True, "status": str(evidence.status), "proof": evidence.text}
    if plan.environment != baseline.environment:
        keep(layer, {**row, "negative": "none: its environment holds for the whole process"})
        return
    with engine_of(recipe, baseline) as plain:
        missed = layer.verify(plain, watched(plain, layer.warm_steps), options)
        assert missed.status is not Status.ACTIVE, f"active on an engine without it: {missed.text}"
    keep(layer, {**row, "negative": missed.text})
