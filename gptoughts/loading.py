"""A checkpoint as a model to read and write with: for generation and evaluation, without a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptoughts import checkpoint, training_state
from gptoughts.build import meta_model
from gptoughts.config import Recipe, from_values
from gptoughts.data.tokenizer import Tokenizer
from gptoughts.distributed import Ranks
from gptoughts.engine import Engine
from gptoughts.errors import CheckpointError, ConfigError, nearest
from gptoughts.layers.attention_sdpa import attend
from gptoughts.machine import World
from gptoughts.models.family import family_of
from gptoughts.objectives import OBJECTIVES


@dataclass(frozen=True)
class Loaded:
    """A trained model with what belongs to it."""

    engine: Engine
    tokenizer: Tokenizer
    recipe: Recipe
    folder: Path
    step: int

    @property
    def model(self) -> nn.Module:
        """The model, in evaluation mode."""
        return self.engine.bare


def find(name: str) -> Path:
    """The checkpoint that a user means: a path, or the name of a run under checkpoints/. Raises CheckpointError."""
    path = Path(name)
    if path.exists():
        return checkpoint.locate(path)
    run = Path("checkpoints") / name
    if run.is_dir():
        return checkpoint.locate(run)
    known = sorted(folder.name for folder in Path("checkpoints").glob("*/") if any(folder.glob("step-*")))
    raise CheckpointError(f"no run or checkpoint {name!r}{nearest(name, known)}; runs here: {', '.join(known) or 'none'}")


def load(name: str, families: Mapping[str, Any] | None = None) -> Loaded:
    """Open a checkpoint on the GPU if there is one, else on the CPU. Raises CheckpointError, ConfigError."""
    folder = find(name)
    state = checkpoint.read_state(folder)
    try:
        values = dict(state["run"]["circumstances"]["recipe"])
    except KeyError:
        raise CheckpointError(f"{folder} holds a model that `fit` trained; only its own code can build it") from None
    rows = values.pop("rows")
    recipe = from_values({key: value for key, value in values.items() if value is not None}, str(folder)).recipe
    family = (families or {}).get(recipe.model.family) or family_of(recipe.model.family)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if recipe.objective not in OBJECTIVES:
        raise ConfigError(f"{folder} was trained with the objective {recipe.objective!r} of a plugin")
    engine = Engine(
        meta_model(recipe, family, rows),
        family,
        OBJECTIVES[recipe.objective](),
        recipe,
        Ranks(World(), device),
        device,
        iter(()),
    )
    engine.materialise(training_state.Weights(folder))
    engine.bare.eval()
    if family.set_attention is not None:
        family.set_attention(engine.bare, attend)
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        engine.wrap_context("eval_context", _bf16)
    return Loaded(engine, Tokenizer.load(folder / "tokenizer"), recipe, folder, state["step"])


def _bf16() -> AbstractContextManager[Any]:
    return torch.autocast("cuda", dtype=torch.bfloat16)


@contextmanager
def reading(loaded: Loaded) -> Iterator[None]:
    """Around forwards without gradients."""
    with torch.no_grad(), loaded.engine.eval_context():
        yield
