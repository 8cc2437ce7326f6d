"""Read and write published LLaDA checkpoints: config.json and safetensors, single or sharded with an index.

In that layout names differ, queries, keys and values are three projections instead of one, and gate and up of the MLP are two. Values are
not changed, so a round trip is bit-identical. Tensors are read one at a time from memory-mapped files. Sizes and config.json are
defined in `gptoughts.config.llada_spec`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gptoughts.config.llada_spec import published
from gptoughts.config.loader import ModelConfig
from gptoughts.errors import CheckpointError
from gptoughts.models.weight_files import INDEX, SINGLE, opened, read_json, weight_files

SHARD_BYTES = 5 * 10**9
PREFIX = "model."  # added by the published wrapper class; files of the inner module lack it

ENDS = {
    "embed.weight": "transformer.wte.weight",
    "norm.weight": "transformer.ln_f.weight",
    "head.weight": "transformer.ff_out.weight",
}
BLOCK = {
    "norm1": ("attn_norm",),
    "attention.qkv": ("q_proj", "k_proj", "v_proj"),
    "attention.out": ("attn_out",),
    "norm2": ("ff_norm",),
    "mlp.gate_up": ("ff_proj", "up_proj"),  # silu is applied to ff_proj
    "mlp.down": ("ff_out",),
}


def llada_names(native: str) -> tuple[str, ...]:
    """Return the LLaDA tensors that form a native parameter, concatenated along dimension 0; empty for unknown names."""
    if native in ENDS:
        return (ENDS[native],)
    parts = native.split(".")
    if len(parts) < 4 or parts[0] != "blocks" or not parts[1].isdigit() or parts[-1] != "weight":
        return ()
    return tuple(f"transformer.blocks.{parts[1]}.{llada_name}.weight" for llada_name in BLOCK.get(".".join(parts[2:-1]), ()))


# --- reading


class Published:
    """Source of the weights in a LLaDA folder, by native names. Tensors are read on demand.

    A tied model has no head tensor; if a file has one, it must equal the embedding bit for bit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.files = {path: opened(path) for path in weight_files(folder)}
        self.stored = {name.removeprefix(PREFIX): (file, name) for file in self.files.values() for name in sorted(file.keys())}
        self._read_names: set[str] = set()

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return the value of the native parameter `name`, in the files' dtype; None if all of its parts are missing.

        Raises CheckpointError if some of its parts are missing, or the shape differs from the model's.
        """
        parts = llada_names(name)
        present = [part for part in parts if part in self.stored]
        if not present:
            return None
        if len(present) < len(parts):
            missing = ", ".join(part for part in parts if part not in self.stored)
            raise CheckpointError(f"{self.folder}: {name} needs {len(parts)} tensors, missing: {missing}")
        if name == "embed.weight" and self.config.get("weight_tying"):
            self._require_tied(parts[0])
        values = [self._read(part) for part in parts]
        value = values[0] if len(values) == 1 else torch.cat(values)
        if value.shape != shape:
            problem = f"{self.folder}: {name} ({' + '.join(parts)}) must have shape {tuple(shape)} by the recipe's [model]"
            raise CheckpointError(problem, found=tuple(value.shape))
        return value

    def buffer(self, name: str) -> Tensor | None:
        """Return None: rotary tables follow from the recipe."""
        return None

    def unused(self) -> list[str]:
        """Return names of tensors in the files that were never read."""
        return sorted(stored for name, (_, stored) in self.stored.items() if name not in self._read_names)

    def _read(self, part: str) -> Tensor:
        file, stored = self.stored[part]
        self._read_names.add(part)
        return file.get_tensor(stored)

    def _require_tied(self, embedding: str) -> None:
        head = ENDS["head.weight"]
        if head in self.stored and not torch.equal(self._read(head), self._read(embedding)):
            raise CheckpointError(f"{self.folder}: config.json ties head and embedding, but {head} differs from {embedding}")


def load(folder: Path) -> Published:
    """Open the weights of a published checkpoint. Raises CheckpointError; never opens a pickle."""
    return Published(folder)


# --- writing


def save(
    state: Mapping[str, Tensor],
    model: ModelConfig,
    folder: Path,
    sequence_length: int,
    *,
    mask_id: int,
    eot_id: int,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `state` (by native names, on any device) as config.json and safetensors, in shards of at most `shard_bytes`.

    A larger tensor gets its own shard. Every file is read back and compared. Raises ConfigError if the layout does not support
    the model; CheckpointError for missing and unused names, a folder that already contains weights, and failed writes.
    """
    config = published(model, state["embed.weight"].shape[0], sequence_length, mask_id, eot_id)
    tied = {"head.weight"} if model.tied else set()
    names = {*ENDS, *(f"blocks.{index}.{part}.weight" for index in range(model.depth) for part in BLOCK)}
    problems = [f"missing: {', '.join(sorted(names - tied - state.keys()))}"] if names - tied - state.keys() else []
    problems += [f"unused: {', '.join(sorted(state.keys() - names))}"] if state.keys() - names else []
    if problems:
        raise CheckpointError(f"model: parameters differ from LLaDA's: {'; '.join(problems)}")
    folder.mkdir(parents=True, exist_ok=True)
    if old := sorted(path.name for path in folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: already contains weights", found=", ".join(old), fix="another folder")
    sizes = {name: state[name].numel() * state[name].element_size() for name in _ordered(state, model)}
    shards: list[list[str]] = [[]]
    free = shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > free:
            shards.append([])
            free = shard_bytes
        shards[-1].append(name)
        free -= size
    weight_map: dict[str, str] = {}
    for number, names_in_shard in enumerate(shards, 1):
        file = folder / (SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors")
        weight_map |= dict.fromkeys(_write(file, dict(_split(state, names_in_shard, model))), file.name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _ordered(state: Mapping[str, Tensor], model: ModelConfig) -> list[str]:
    return [name for name in state if not (model.tied and name == "head.weight")]


def _split(state: Mapping[str, Tensor], names: list[str], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield LLaDA names and tensors of the given native parameters."""
    key_rows = model.key_value_heads * model.head_dim
    rows = {3: [model.width, key_rows, key_rows], 2: [model.inner, model.inner]}
    for name in names:
        parts = llada_names(name)
        value = state[name].detach().cpu()
        pieces = [value] if len(parts) == 1 else value.split(rows[len(parts)])
        for part, piece in zip(parts, pieces, strict=True):
            yield PREFIX + part, piece.clone(memory_format=torch.contiguous_format)


def _write(file: Path, tensors: dict[str, Tensor]) -> list[str]:
    save_file(tensors, file, metadata={"format": "pt"})
    with opened(file) as written:
        same = set(written.keys()) == tensors.keys() and all(
            torch.equal(written.get_tensor(name).view(torch.uint8), tensor.view(torch.uint8))
            for name, tensor in tensors.items()
        )
    if not same:
        raise CheckpointError(f"{file}: read-back differs from the written values", fix="check free disk space")
    return list(tensors)
