"""A trained model as a folder for others, by name: whole and merged, or its adapter alone as peft opens it, with proof of equal logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptoughts.engine.engine import Source
from gptoughts.engine.from_recipe import base_record, base_weights, initial_weights, model_bundle
from gptoughts.errors import CheckpointError, ConfigError
from gptoughts.inference.export import Proof, compare, export, fresh, ids_of, passage_of, require
from gptoughts.inference.load import Loaded, load, reading_engine
from gptoughts.models.adapters.adapter import NAME, adapter_layers, frozen_values, peft
from gptoughts.models.adapters.folder import AdapterFolder, save_adapter
from gptoughts.models.adapters.nf4 import is_turned, quiet
from gptoughts.models.adapters.weights import AdapterSource
from gptoughts.models.sources import meta_model


class Held:
    """Values by name as a source."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self._values = values

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """The value of a parameter, or None."""
        return self._values.get(name)

    def buffer(self, name: str) -> Tensor | None:
        """The value of a persistent buffer, or None."""
        return self._values.get(name)

    def unused(self) -> list[str]:
        """Nothing: a tied weight may stand under two names."""
        return []


def export_checkpoint(
    checkpoint: str, out: str, base: str | None = None, adapter_only: bool = False, text: str | None = None
) -> str:
    """Write the folder `out` from a checkpoint, a run or an adapter, and check it. Returns what to print. Raises CheckpointError."""
    loaded = load(checkpoint, base=base, attention="written out")  # as transformers computes where it is compared
    passage = passage_of(text)
    if adapter_only:
        proof, notes = export_adapter(loaded, Path(out), passage)
    else:
        proof, notes = export(
            loaded.model, loaded.recipe, loaded.tokenizer, Path(out), passage, loaded.folder, getattr(loaded, "mask_id", None)
        )
    return "\n".join([f"wrote {out}", *notes, str(proof)])


def export_adapter(loaded: Loaded, out: Path, text: str) -> tuple[Proof, list[str]]:
    """Write the adapter of `loaded`, open it over its base as its users will, and compare logits on `text`.

    Raises ConfigError for a model without adapter, CheckpointError where `out` is taken or opens as another model.
    """
    if not adapter_layers(loaded.model):
        raise ConfigError("--adapter-only: this model has no adapter; leave the flag out")
    if loaded.recipe.adapter.kind == "none":
        raise ConfigError(f"--adapter-only: {loaded.folder} is an adapter in peft's layout already; copy it")
    ids = ids_of(text, loaded.tokenizer, loaded.model).to(loaded.engine.device)
    recipe, device = loaded.recipe, loaded.engine.device
    record = base_record(recipe)
    # What the adapter began as follows from its base and the seed; PiSSA's is written as the change from there.
    begun = initial_weights(recipe, loaded.parts, loaded.model, device)
    assert isinstance(begun, AdapterSource)
    with torch.no_grad(), fresh(out) as folder:
        ours = loaded.model(ids)
        save_adapter(loaded.model, recipe.adapter, folder, record, begun, "CAUSAL_LM" if recipe.model.family == "hf" else None)
        proof = compare(ours, _opened(loaded, folder, _base(loaded, begun))(ids))
        require(proof, out)
    return proof, [f"the adapter alone; its base is {record.path}"]


def _base(loaded: Loaded, begun: AdapterSource) -> Source:
    """The base's weights; of a packed one what it rounded them to, which is what the adapter was trained over."""
    assert loaded.parts.base is not None
    if loaded.recipe.adapter.base == "full":
        return base_weights(loaded.recipe, loaded.parts.base)
    values = frozen_values(loaded.model)
    if loaded.recipe.adapter.kind == "pissa":
        for name, layer in adapter_layers(loaded.model).items():
            a, b = begun.start(name)
            taken = (layer.scaling[NAME] * (b @ a)).cpu()
            values[f"{name}.weight"] = values[f"{name}.weight"] + (taken.t() if is_turned(layer.base_layer) else taken)
    return Held(values)


def _opened(loaded: Loaded, folder: Path, base: Source) -> nn.Module:
    """The base with the adapter in `folder`: by peft where transformers knows the base, by our own reader where only we do."""
    recipe, device = loaded.recipe, loaded.engine.device
    plain = recipe.model_copy(update={"adapter": type(recipe.adapter)()})
    theirs = recipe.model.family == "hf"
    parts = model_bundle(plain, loaded.tokenizer, {}, {}, None if theirs else folder)
    model: Any = meta_model(plain, parts.family, parts.rows)
    source = base if theirs else AdapterSource(base, model, saved=AdapterFolder(folder), device=device)
    reading_engine(plain, parts, model, device, source, "written out")
    if theirs:
        try:
            with quiet():
                peft().PeftModel.from_pretrained(model.inner, folder)  # puts its layers into the model, in place
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"peft cannot open what was written: {error}") from error
    read: nn.Module = model.eval()
    return read
