"""Small real engines for the tests: a recipe, a plan for this machine, and an engine that can step."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptoughts.config.loader import Recipe, from_values
from gptoughts.config.model_spec import spec_for
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine
from gptoughts.engine.objectives.base import NextToken, Objective
from gptoughts.engine.objectives.masked_diffusion import MaskedDiffusion
from gptoughts.engine.objectives.span_qa import QuestionAnswering
from gptoughts.engine.trainer import Progress, run_step
from gptoughts.hardware.machine import Machine, probe
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.models.family import FAMILIES, Family
from gptoughts.models.sources import Initialization, meta_model
from gptoughts.planning.layer import Layer, StepTrace
from gptoughts.planning.profile import Match, Profile
from gptoughts.planning.resolve import Plan, resolve
from gptoughts.run import step_trace
from gptoughts.run.build import build_engine
from tests.models.hf.hf_configs import write_config

NEEDS_INDUCTOR = pytest.mark.skipif(
    " " in sys.prefix, reason="torch's inductor does not quote paths for the linker, and this environment's path holds a space"
)
"""For tests that compile with inductor."""


def compile_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile modules with the backend aot_eager: graphs of forward and backward, no machine code."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_module(self, backend="aot_eager", **options)
    )


ROWS, LENGTH, BATCH = 128, 32, 4
FAMILIES_UNDER_TEST: dict[str, dict[str, Any]] = {
    "modern": {"depth": 3, "width": 64, "heads": 4, "kv_heads": 2},
    "gpt2": {
        "depth": 3, "width": 64, "heads": 4, "norm": "layernorm", "positions": "learned", "mlp": "gelu", "qk_norm": False, "bias": True,
    },
    "llada": {"family": "llada", "depth": 3, "width": 64, "heads": 4},
    "llama": {"family": "hf", "config": "llama"},
    "deepseek": {"family": "hf", "config": "deepseek_v3"},
    "bert": {"family": "hf", "config": "bert"},
}  # fmt: skip
OBJECTIVE_OF = {"llada": "masked-diffusion", "bert": "question-answering"}


@cache
def config_folder(kind: str) -> str:
    """A folder with the config.json of a tiny model of transformers."""
    return str(write_config(Path(tempfile.mkdtemp(prefix="gptoughts-test-")) / kind, kind))


def recipe_of(family: str = "modern", **more: Any) -> Recipe:
    """A recipe of a few thousand parameters."""
    model = dict(FAMILIES_UNDER_TEST[family])
    if "config" in model:
        model["config"] = config_folder(model["config"])
    objective = OBJECTIVE_OF.get(family, "next-token")
    values = {
        "name": "tiny",
        "objective": objective,
        "model": {**model, "vocab_size": ROWS},
        "data": {
            "sequence_length": LENGTH,
            "tokenizer": "chars",
            "format": "squad" if objective == "question-answering" else "text",
        },
        "train": {"steps": 100_000, "global_batch": BATCH},
        "optim": {"warmup_steps": 0, "learning_rate": 1e-3},
    }
    return from_values({**values, **more}, "the test").recipe


def plan_of(
    recipe: Recipe, layers: Mapping[str, Any] | None = None, world: World | None = None, machine: Machine | None = None
) -> Plan:
    """A plan of baselines, with `layers` demanded."""
    bare = Profile("bare", "", False, Match(), {}, "the test")
    return resolve(bare, machine or probe(), spec_for(recipe), recipe, world or World(), CATALOG, flags=layers)


def family_for(recipe: Recipe) -> Family:
    """The recipe's family, native or of transformers."""
    if recipe.model.family != "hf":
        return FAMILIES[recipe.model.family]
    from gptoughts.models.hf.family import hf_family

    return hf_family(recipe.model, "question-answering" if recipe.objective == "question-answering" else "causal")


def objective_for(recipe: Recipe) -> Objective:
    """The recipe's objective; the last id is the mask."""
    if recipe.objective == "masked-diffusion":
        return MaskedDiffusion(recipe.diffusion, recipe.seed, ROWS - 1, ROWS - 2)
    return QuestionAnswering() if recipe.objective == "question-answering" else NextToken()


def random_batches(recipe: Recipe, ragged: bool = False, seed: int = 0) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    """Endless batches for the recipe's objective; ragged ones count a different number of labels in every row."""
    batches = _random_text(recipe, ragged, seed)
    if recipe.objective == "question-answering":
        batches = _random_questions(recipe, seed)
    if recipe.objective == "masked-diffusion":
        objective, count = objective_for(recipe), recipe.train.global_batch
        assert isinstance(objective, MaskedDiffusion)
        for batch, number in batches:
            host = {key: value.numpy() for key, value in batch.items()}
            noised = objective.prepare(host, np.arange((number - 1) * count, number * count))
            yield {key: torch.from_numpy(np.asarray(value)) for key, value in noised.items()}, number
    yield from batches


def _random_questions(recipe: Recipe, seed: int) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    generator = torch.Generator().manual_seed(seed)
    rows, number = recipe.train.global_batch, 0
    while True:
        number += 1
        ids = torch.randint(0, ROWS, (rows, LENGTH), generator=generator)
        lengths = torch.randint(LENGTH // 2, LENGTH + 1, (rows, 1), generator=generator)
        mask = torch.arange(LENGTH) < lengths
        starts = torch.randint(0, LENGTH // 2, (rows,), generator=generator)
        types = (torch.arange(LENGTH) > 8).long().expand(rows, -1)
        yield {"input_ids": ids, "token_types": types, "mask": mask, "starts": starts, "ends": starts}, number


def _random_text(recipe: Recipe, ragged: bool, seed: int) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    generator = torch.Generator().manual_seed(seed)
    number = 0
    ids_below = ROWS - 2 if recipe.objective == "masked-diffusion" else ROWS
    while True:
        number += 1
        ids = torch.randint(0, ids_below, (recipe.train.global_batch, LENGTH + 1), generator=generator)
        batch = {"input_ids": ids}
        if ragged:
            kept = torch.randint(1, LENGTH, (recipe.train.global_batch, 1), generator=generator)
            batch["labels"] = ids.masked_fill(torch.arange(LENGTH + 1) > kept, -100)
        yield batch, number


@contextmanager
def engine_of(
    recipe: Recipe,
    plan: Plan,
    batches: Iterator[Any] | None = None,
    ranks: Ranks | None = None,
    catalog: Mapping[str, Layer] = CATALOG,
) -> Iterator[Engine]:
    """The engine of `plan` on this CPU."""
    family = family_for(recipe)
    model = meta_model(recipe, family, ROWS)
    source = Initialization(family, recipe.model, recipe.seed)
    here = ranks or Ranks(World(), torch.device("cpu"))
    stream = batches or random_batches(recipe)
    with build_engine(
        model, family, objective_for(recipe), recipe, plan, catalog, ranks=here, batches=stream, source=source
    ) as engine:
        yield engine


def steps(engine: Engine, count: int) -> list[float]:
    """Losses of `count` updates."""
    losses = []
    progress = Progress()
    engine.model.train()
    for _ in range(count):
        progress, stats = run_step(engine, progress, lambda _: 1e-3)
        losses.append(float(stats.loss_sum / stats.weight))
    return losses


def watched(engine: Engine, warm: int = 1) -> StepTrace:
    """What the profiler sees of one step after `warm` others."""
    steps(engine, warm)

    def one() -> None:
        steps(engine, 1)

    return step_trace.trace_step(engine, one)
