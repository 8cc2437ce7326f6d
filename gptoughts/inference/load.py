"""A trained model to read and write with, without a plan: a checkpoint of ours, an exported folder, or an adapter beside its base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gptoughts.config import hf_spec
from gptoughts.config.loader import Recipe, from_values
from gptoughts.config.model_path import PACKAGE, folder_of
from gptoughts.config.recipe import ModelConfig
from gptoughts.config.resolve import resolve_recipe
from gptoughts.data.tokenizers.tokenizer import Tokenizer, bpe_from_files
from gptoughts.engine.checkpoint import store as checkpoint
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine, Source
from gptoughts.engine.from_recipe import ModelBundle, initial_weights, model_bundle, resumed_weights
from gptoughts.errors import CheckpointError, ConfigError, LayerError, nearest
from gptoughts.hardware.machine import World
from gptoughts.models.adapters.folder import read_config as read_adapter
from gptoughts.models.gpt.sdpa import attend
from gptoughts.models.sources import meta_model


@dataclass(frozen=True)
class Loaded:
    """A trained model with what belongs to it."""

    engine: Engine
    tokenizer: Tokenizer
    recipe: Recipe
    folder: Path
    step: int | None
    """None where the folder does not say."""
    parts: ModelBundle

    @property
    def model(self) -> nn.Module:
        """The model, in evaluation mode."""
        return self.engine.bare

    @property
    def mask_id(self) -> int | None:
        """The mask of a model that denoises."""
        return self.parts.mask_id


def find(name: str) -> Path:
    """The folder that a user means: a checkpoint, an exported folder, or the name of a run under checkpoints/. Raises CheckpointError."""
    path = folder_of(name) if name.startswith(PACKAGE) else Path(name).expanduser()
    if is_exported(path):
        return path
    if path.exists():
        return checkpoint.locate(path)
    run = Path("checkpoints") / name
    if run.is_dir():
        return checkpoint.locate(run)
    known = sorted(folder.name for folder in Path("checkpoints").glob("*/") if any(folder.glob("step-*")))
    raise CheckpointError(f"no run or checkpoint {name!r}{nearest(name, known)}; runs here: {', '.join(known) or 'none'}")


def is_exported(path: Path) -> bool:
    """Whether a folder is one that Hugging Face tools open: a model or an adapter, and no checkpoint of ours."""
    there = any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
    return there and not (path / "state.json").is_file()


Attend = Literal["fused", "written out"]


def load(name: str, families: Mapping[str, Any] | None = None, base: str | None = None, attention: Attend = "fused") -> Loaded:
    """Open a checkpoint or an exported folder on the GPU if there is one, else on the CPU.

    `attention` written out is slower, and the same arithmetic as that of any other program that writes it out.

    `base` is the model of an adapter whose own note of it does not hold here. Raises CheckpointError, ConfigError.
    """
    folder = find(name)
    if is_exported(folder):
        recipe, step = exported_recipe(folder, base), None
        tokenizer: Tokenizer = bpe_from_files(recipe.data.tokenizer)
    else:
        recipe, step = trained_recipe(folder, base)
        tokenizer = Tokenizer.load(folder / "tokenizer")
    adapter = folder if (folder / "adapter_config.json").is_file() else None
    parts = model_bundle(recipe, tokenizer, families or {}, {}, adapter)
    model = meta_model(recipe, parts.family, parts.rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = (
        initial_weights(recipe, parts, model, device, adapter)
        if is_exported(folder)
        else resumed_weights(recipe, parts, model, device, folder)
    )
    return Loaded(reading_engine(recipe, parts, model, device, source, attention), tokenizer, recipe, folder, step, parts)


def require_base(folder: Path, adapted: bool, base: str | None, noted: str | None) -> None:
    """Raise ConfigError for a `base` of something that is no adapter, and for an adapter whose base is not where it was."""
    if base is not None and not adapted:
        raise ConfigError(f"--base {base}: {folder} is no adapter and holds all of its weights; leave the flag out")
    if adapted and noted:
        try:
            folder_of(noted)
        except ConfigError as error:
            raise ConfigError(f"{error}\n  it is the base of the adapter in {folder}\n  try: --base FOLDER") from None


def trained_recipe(folder: Path, base: str | None) -> tuple[Recipe, int]:
    """The recipe and the step of a checkpoint of ours."""
    state = checkpoint.read_state(folder)
    try:
        values = dict(state["run"]["circumstances"]["recipe"])
    except KeyError:
        raise CheckpointError(f"{folder} holds a model that `fit` trained; only its own code can build it") from None
    values.pop("rows")
    adapted = values.get("adapter.kind", "none") != "none"
    if (folder / "base").is_dir() and not adapted and values.get("model.remote_code") is None:
        # Its weights lie in the checkpoint, and so does the config that they go with: the model they began from may be gone.
        # Only code of its own does not: that stays where the recipe allowed it to run.
        values |= {"model.path": None, "model.config": str(folder / "base")}
    require_base(folder, adapted, base, base or values.get("model.path"))
    if base is not None:
        values["model.path"] = base
    recipe = from_values({key: value for key, value in values.items() if value is not None}, str(folder)).recipe
    return recipe, state["step"]


def exported_recipe(folder: Path, base: str | None) -> Recipe:
    """The recipe that describes a folder of Hugging Face's layout."""
    path = str(folder)
    values: dict[str, Any] = {"name": folder.name, "train.steps": 1, "data.sequence_length": 1}
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        noted = read_adapter(folder)
        path = base or noted.get("base_model_name_or_path") or ""
        if not path:
            raise CheckpointError(f"{adapter} does not name its base model\n  try: --base FOLDER")
    require_base(folder, adapter.is_file(), base, path)
    values["model.path"] = path
    content = hf_spec.read_config(ModelConfig(path=path))
    if any(str(name).endswith("ForQuestionAnswering") for name in content.get("architectures") or ()):
        values |= {"objective": "question-answering", "data.format": "squad"}
    if content["model_type"] == "llada":
        values["objective"] = "masked-diffusion"
    recipe = resolve_recipe(from_values(values, path)).recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"sequence_length": positions_of(recipe)})})


def positions_of(recipe: Recipe) -> int:
    """The longest context of the recipe's model, by its config."""
    return hf_spec.max_positions(hf_spec.read_config(recipe.model)) or 4096


def reading_engine(
    recipe: Recipe, parts: ModelBundle, model: nn.Module, device: torch.device, source: Source, attention: Attend
) -> Engine:
    """The model with its weights, in evaluation mode, with fused attention where its family offers its own for replacement."""
    engine = Engine(
        model,
        parts.family,
        parts.objective,
        recipe,
        Ranks(World(), device),
        device,
        batches=iter(()),
    )
    engine.materialize(source)
    engine.bare.eval()
    if attention == "fused" and parts.family.set_attention is not None:
        with suppress(LayerError):  # some models cannot have theirs replaced; nobody asked for it by name
            parts.family.set_attention(engine.bare, attend)
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        engine.wrap_context("eval_context", _bf16)
    return engine


def _bf16() -> AbstractContextManager[Any]:
    return torch.autocast("cuda", dtype=torch.bfloat16)


@contextmanager
def reading(loaded: Loaded) -> Iterator[None]:
    """Around forwards without gradients."""
    with torch.no_grad(), loaded.engine.eval_context():
        yield
