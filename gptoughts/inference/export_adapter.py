"""Export a checkpoint: merged weights for transformers, or only its adapter for peft, verified by equal logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptoughts.engine.engine import Source
from gptoughts.engine.from_recipe import base_record, base_weights, initial_weights, model_bundle
from gptoughts.errors import CheckpointError, ConfigError
from gptoughts.inference.export import Proof, compare, export, fresh, ids_of, passage_of, require
from gptoughts.inference.load import LoadedModel, inference_engine, load
from gptoughts.models.adapters.adapter import NAME, adapter_layers, peft
from gptoughts.models.adapters.folder import AdapterFolder, save_adapter
from gptoughts.models.adapters.merge import frozen_values
from gptoughts.models.adapters.nf4 import is_turned, quiet
from gptoughts.models.adapters.weights import AdapterSource
from gptoughts.models.sources import meta_model


class InMemorySource:
    """Weights in memory as a source."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self._values = values

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return a parameter, or None."""
        return self._values.get(name)

    def buffer(self, name: str) -> Tensor | None:
        """Return a persistent buffer, or None."""
        return self._values.get(name)

    def unused(self) -> list[str]:
        """Return no names, because a tied weight may have two."""
        return []


def export_checkpoint(
    checkpoint: str,
    out: str,
    base: str | None = None,
    adapter_only: bool = False,
    text: str | None = None,
    remote_code: str | None = None,
) -> str:
    """Export a checkpoint, run or adapter to the folder `out` and verify it. Returns the lines to print. Raises CheckpointError."""
    # Attention as in the reopened transformers model.
    loaded = load(checkpoint, base=base, attention="written out", remote_code=remote_code)
    passage = passage_of(text)
    if adapter_only:
        proof, notes = export_adapter(loaded, Path(out), passage)
    else:
        proof, notes = export(
            loaded.model, loaded.recipe, loaded.tokenizer, Path(out), passage, origin=loaded.folder, mask_id=loaded.mask_id
        )
    return "\n".join([f"wrote {out}", *notes, str(proof)])


def export_adapter(loaded: LoadedModel, out: Path, text: str) -> tuple[Proof, list[str]]:
    """Write the adapter of `loaded`, reopen it over its base and compare logits on `text`. Returns the proof and notes.

    Raises ConfigError for a model without adapter, CheckpointError if `out` is not empty or the reopened model differs.
    """
    if not adapter_layers(loaded.model):
        raise ConfigError("--adapter-only: the model has no adapter", fix="omit --adapter-only")
    if loaded.recipe.adapter.kind == "none":
        raise ConfigError(f"--adapter-only: {loaded.folder} is already an adapter in peft's layout", fix="copy the folder")
    ids = ids_of(text, loaded.tokenizer, loaded.model).to(loaded.engine.device)
    recipe, device = loaded.recipe, loaded.engine.device
    record = base_record(recipe)
    # The initial adapter follows from the base and the seed; PiSSA is saved as the change from it.
    initial = initial_weights(recipe, loaded.parts, loaded.model, device)
    assert isinstance(initial, AdapterSource)
    with torch.no_grad(), fresh(out) as folder:
        expected = loaded.model(ids)
        save_adapter(
            loaded.model, recipe.adapter, folder, record, initial, "CAUSAL_LM" if recipe.model.family == "hf" else None
        )
        proof = compare(expected, _reopen(loaded, folder, _base_source(loaded, initial))(ids))
        require(proof, out)
    return proof, [f"adapter only; base model: {record.path}"]


def _base_source(loaded: LoadedModel, initial: AdapterSource) -> Source:
    """Return the base weights: for a quantized base the dequantized ones, on which the adapter was trained."""
    assert loaded.parts.base is not None
    if loaded.recipe.adapter.base == "full":
        return base_weights(loaded.recipe, loaded.parts.base)
    values = frozen_values(loaded.model)
    if loaded.recipe.adapter.kind == "pissa":
        for name, layer in adapter_layers(loaded.model).items():
            a, b = initial.start(name)
            principal = (layer.scaling[NAME] * (b @ a)).cpu()  # the part that PiSSA moved from the base to the adapter
            weight = values[f"{name}.weight"]
            values[f"{name}.weight"] = weight + (principal.t() if is_turned(layer.base_layer) else principal)
    return InMemorySource(values)


def _reopen(loaded: LoadedModel, folder: Path, base: Source) -> nn.Module:
    """Return the base with the adapter in `folder`, opened by peft for transformers models, else by our own reader."""
    recipe, device = loaded.recipe, loaded.engine.device
    plain = recipe.model_copy(update={"adapter": type(recipe.adapter)()})
    is_hf = recipe.model.family == "hf"
    parts = model_bundle(plain, loaded.tokenizer, {}, {}, None if is_hf else folder)
    model: Any = meta_model(plain, parts.family, parts.rows)
    source = base if is_hf else AdapterSource(base, model, saved=AdapterFolder(folder), device=device)
    inference_engine(plain, parts, model, device, source, "written out")
    if is_hf:
        try:
            with quiet():
                peft().PeftModel.from_pretrained(model.inner, folder)  # modifies the model in place
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"export: peft cannot open the written folder: {error}") from error
    reopened: nn.Module = model.eval()
    return reopened
