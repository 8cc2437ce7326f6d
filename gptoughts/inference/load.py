"""Load a trained model for inference, without a plan: a checkpoint, an exported folder, or an adapter with its base."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gptoughts.config import hf_spec
from gptoughts.config.loader import REMOTE_CODE, Recipe, from_values
from gptoughts.config.model_path import PACKAGE, resolve_model_folder
from gptoughts.config.recipe import ModelConfig
from gptoughts.config.resolve import resolve_recipe
from gptoughts.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from gptoughts.engine.checkpoint import integrity
from gptoughts.engine.checkpoint import store as checkpoint
from gptoughts.engine.checkpoint.parts import TensorFiles
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine, Source
from gptoughts.engine.from_recipe import ModelBundle, initial_weights, model_bundle, resumed_weights
from gptoughts.errors import CheckpointError, ConfigError, LayerError, nearest
from gptoughts.hardware.cpu import read_free_bytes
from gptoughts.hardware.world import World
from gptoughts.models.adapters.folder import read_config as read_adapter
from gptoughts.models.gpt.sdpa import attend
from gptoughts.models.sources import meta_model
from gptoughts.models.weight_files import refuse_larger

TABLE_BYTES = 14
"""Bytes per position and channel while rotary tables are computed: two of fp64, two of fp32, for half the channels."""


@dataclass(frozen=True)
class LoadedModel:
    """A trained model with its tokenizer, recipe and folder."""

    engine: Engine
    tokenizer: Tokenizer
    recipe: Recipe
    folder: Path
    step: int | None
    """None if unknown."""
    parts: ModelBundle

    @property
    def model(self) -> nn.Module:
        """The model, in evaluation mode."""
        return self.engine.bare

    @property
    def mask_id(self) -> int | None:
        """Mask token id of a masked-diffusion model, else None."""
        return self.parts.mask_id


def find(name: str) -> Path:
    """Return the folder of a checkpoint, an exported folder, or a run name under checkpoints/. Raises CheckpointError."""
    path = resolve_model_folder(name) if name.startswith(PACKAGE) else Path(name).expanduser()
    if is_exported(path):
        return path
    if path.exists():
        return integrity.locate(path)
    run = Path("checkpoints") / name
    if run.is_dir():
        return integrity.locate(run)
    known = sorted(folder.name for folder in Path("checkpoints").glob("*/") if any(folder.glob("step-*")))
    raise CheckpointError(
        f"{name}: no such run or checkpoint{nearest(name, known)}",
        found=f"the runs {', '.join(known)}" if known else "no runs in checkpoints/",
    )


def is_exported(path: Path) -> bool:
    """Whether a folder has Hugging Face's layout (a model or an adapter) and is not a gptoughts checkpoint."""
    has_config = any((path / name).is_file() for name in ("config.json", "adapter_config.json"))
    return has_config and not (path / "state.json").is_file()


Attend = Literal["fused", "written out"]


def load(
    name: str,
    families: Mapping[str, Any] | None = None,
    base: str | None = None,
    attention: Attend = "fused",
    remote_code: str | None = None,
) -> LoadedModel:
    """Load a checkpoint or an exported folder on the GPU if there is one, else on the CPU.

    base         overrides the base model recorded by an adapter
    attention    "written out" is slower, and computes the same as other eager implementations
    remote_code  the folder or hub name whose code may run; what a checkpoint says about it does not count

    Raises CheckpointError, ConfigError.
    """
    folder = find(name)
    if is_exported(folder):
        recipe, step = exported_recipe(folder, base, remote_code), None
        tokenizer: Tokenizer = load_tokenizer(recipe.data.tokenizer)
    else:
        recipe, step = trained_recipe(folder, base, remote_code)
        tokenizer = Tokenizer.load(folder / "tokenizer")
    adapter = folder if (folder / "adapter_config.json").is_file() else None
    parts = model_bundle(recipe, tokenizer, families or {}, {}, adapter)
    check_tables(recipe, str(folder))
    model = meta_model(recipe, parts.family, parts.rows)
    if step is not None:
        check_shapes(folder, model, adapter is not None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = (
        initial_weights(recipe, parts, model, device, adapter)
        if is_exported(folder)
        else resumed_weights(recipe, parts, model, device, folder)
    )
    return LoadedModel(
        inference_engine(recipe, parts, model, device, source, attention), tokenizer, recipe, folder, step, parts
    )


def check_shapes(folder: Path, model: nn.Module, adapted: bool) -> None:
    """Raise CheckpointError where the recipe of a checkpoint describes other shapes than its weights, before they are allocated."""
    files = TensorFiles(folder, "model")
    for name, parameter in model.named_parameters():
        if name in files and files.shape(name) != tuple(parameter.shape):
            problem = f"{folder}: the recipe in state.json gives {name} the shape {list(parameter.shape)}"
            raise CheckpointError(
                problem, found=f"{list(files.shape(name))} in the file of weights", fix="an earlier checkpoint"
            )
    if not adapted:
        planned = sum(parameter.numel() for parameter in model.parameters())
        refuse_larger(planned, folder.glob("model*.safetensors"), f"{folder / 'state.json'}, recipe")


def check_tables(recipe: Recipe, what: str) -> None:
    """Raise CheckpointError where the rotary tables of the recipe's context do not fit into free memory: no file limits them."""
    model, free = recipe.model, read_free_bytes()
    if model.family == "hf" or model.positions != "rope" or free is None:
        return
    needed = recipe.data.sequence_length * model.head_dim * TABLE_BYTES
    if needed > free:
        problem = f"{what}: the tables of positions of {recipe.data.sequence_length:,} tokens need {needed >> 20:,} MiB"
        raise CheckpointError(problem, found=f"{free >> 20:,} MiB free")


def require_base(folder: Path, adapted: bool, base: str | None, recorded: str | None) -> None:
    """Raise ConfigError for `base` without an adapter, and for an adapter whose base model is missing."""
    if base is not None and not adapted:
        raise ConfigError(f"--base {base}: {folder} is not an adapter", fix="omit --base")
    if adapted and recorded:
        try:
            resolve_model_folder(recorded)
        except ConfigError as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise ConfigError(f"{folder}: base model of the adapter not found: {reason}", fix="--base FOLDER") from None


def trained_recipe(folder: Path, base: str | None, remote_code: str | None = None) -> tuple[Recipe, int]:
    """Return the recipe and the step of a checkpoint. Raises CheckpointError."""
    state = checkpoint.read_state(folder)
    try:
        values = dict(state["run"]["circumstances"]["recipe"])
        step = int(state["step"])
    except KeyError:
        raise CheckpointError(f"{folder}: model trained by `gptoughts.fit`, which only its own code can build") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{folder / 'state.json'}: no recipe or step ({error})", fix="an earlier checkpoint") from None
    values.pop("rows", None)
    adapted = values.get("adapter.kind", "none") != "none"
    if (folder / "base").is_dir() and not adapted and values.get("model.remote_code") is None:
        # The checkpoint stores the weights and their config, so the initial model folder is not needed.
        # Remote code is not stored: it runs only from the folder that the recipe names.
        values |= {"model.path": None, "model.config": str(folder / "base")}
    require_base(folder, adapted, base, base or values.get("model.path"))
    if base is not None:
        values["model.path"] = base
    values |= {REMOTE_CODE: consent(folder, values.get("model.path"), remote_code, values.get(REMOTE_CODE) is not None)}
    recipe = from_values({key: value for key, value in values.items() if value is not None}, str(folder)).recipe
    return recipe, step


def consent(folder: Path, path: str | None, given: str | None, needed: bool) -> str | None:
    """Return the model whose code may run: `given` for this command, never what a file in `folder` says.

    Raises CheckpointError for a model that needs its code without consent, ConfigError for consent to another model.
    """
    if given is None and needed:
        raise CheckpointError(
            f"{folder}: trained with the model's own code, which runs only if this command allows it",
            found=f"model.path {path!r}",
            fix=f"--remote-code {shlex.quote(str(path))}, if you trust the code there",
        )
    if given is not None and (path is None or given != path):
        fix = "omit --remote-code" if path is None else f"--remote-code {shlex.quote(path)}"
        raise ConfigError(f"--remote-code {given}: not the model of {folder}", found=repr(path), fix=fix)
    return given


def exported_recipe(folder: Path, base: str | None, remote_code: str | None = None) -> Recipe:
    """Return a recipe for a folder with Hugging Face's layout. Raises CheckpointError, ConfigError."""
    path = str(folder)
    values: dict[str, Any] = {"name": folder.name, "train.steps": 1, "data.sequence_length": 1}
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        config = read_adapter(folder)
        path = base or config.get("base_model_name_or_path") or ""
        if not path:
            raise CheckpointError(f"{adapter}: no base_model_name_or_path", fix="--base FOLDER")
    require_base(folder, adapter.is_file(), base, path)
    values |= {"model.path": path, REMOTE_CODE: consent(folder, path, remote_code, False)}
    content = hf_spec.read_config(ModelConfig(path=path))
    if any(str(name).endswith("ForQuestionAnswering") for name in content.get("architectures") or ()):
        values |= {"objective": "question-answering", "data.format": "squad"}
    if content["model_type"] == "llada":
        values["objective"] = "masked-diffusion"
    recipe = resolve_recipe(from_values(values, path)).recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"sequence_length": positions_of(recipe)})})


def positions_of(recipe: Recipe) -> int:
    """Return the context length of the recipe's model from its config."""
    return hf_spec.max_positions(hf_spec.read_config(recipe.model)) or 4096


def inference_engine(
    recipe: Recipe, parts: ModelBundle, model: nn.Module, device: torch.device, source: Source, attention: Attend
) -> Engine:
    """Return an engine with loaded weights, in evaluation mode, with fused attention if the family supports replacing it."""
    engine = Engine(model, parts.family, parts.objective, recipe, Ranks(World(), device), device, batches=iter(()))
    engine.materialize(source)
    engine.bare.eval()
    if attention == "fused" and parts.family.set_attention is not None:
        with suppress(LayerError):  # optional: some models do not support replacement
            parts.family.set_attention(engine.bare, attend)
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        engine.wrap_context("eval_context", _bf16_autocast)
    return engine


def _bf16_autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cuda", dtype=torch.bfloat16)


@contextmanager
def inference_mode(loaded: LoadedModel) -> Iterator[None]:
    """Disable gradients and enter the engine's evaluation context."""
    with torch.no_grad(), loaded.engine.eval_context():
        yield
