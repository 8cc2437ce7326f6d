"""The layout of published LLaDA checkpoints, both ways: config.json and safetensors, whole or in shards with an index.

What differs there: other names, queries, keys and values as three projections where the native model has one, and the gate
and the up of the MLP as two. Values are moved, never changed, so a round trip gives the same bits. Tensors are read one at a
time from files mapped into memory: opening 8 billion parameters costs nothing. Sizes are `gptoughts.config.llada_spec`'s business.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptoughts.config.llada_spec import published
from gptoughts.config.loader import ModelConfig
from gptoughts.errors import CheckpointError
from gptoughts.models.json_file import read_json

SHARD_BYTES = 5 * 10**9
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
PREFIX = "model."  # of the published class around the transformer; files of the inner module alone lack it

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
    "mlp.gate_up": ("ff_proj", "up_proj"),  # silu is taken of ff_proj
    "mlp.down": ("ff_out",),
}


def published_names(native: str) -> tuple[str, ...]:
    """The tensors that make up the native parameter, joined along their first dimension; none for a name that LLaDA has not."""
    if native in ENDS:
        return (ENDS[native],)
    parts = native.split(".")
    if len(parts) < 4 or parts[0] != "blocks" or not parts[1].isdigit() or parts[-1] != "weight":
        return ()
    return tuple(f"transformer.blocks.{parts[1]}.{theirs}.weight" for theirs in BLOCK.get(".".join(parts[2:-1]), ()))


# --- reading


class Published:
    """The weights in a folder of that layout, as a Source by native names. Nothing is read before it is asked for.

    A tied model has no head of its own; where a file holds one all the same, it must be the embedding, bit for bit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.files = {path: _opened(path) for path in _files(folder)}
        self.holders = {name.removeprefix(PREFIX): (file, name) for file in self.files.values() for name in sorted(file.keys())}
        self._asked: set[str] = set()

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """The full value of the native parameter `name`, in the files' dtype; None where they have none of its parts.

        Raises CheckpointError where some of its parts are missing, or the file has other sizes than the model.
        """
        parts = published_names(name)
        held = [part for part in parts if part in self.holders]
        if not held:
            return None
        if len(held) < len(parts):
            missing = ", ".join(part for part in parts if part not in self.holders)
            raise CheckpointError(f"{self.folder}: {name} is made of {len(parts)} tensors, not there: {missing}")
        if name == "embed.weight" and self.config.get("weight_tying"):
            self._require_tied(parts[0])
        values = [self._read(part) for part in parts]
        value = values[0] if len(values) == 1 else torch.cat(values)
        if value.shape != shape:
            raise CheckpointError(
                f"{self.folder}: {' + '.join(parts)} make {name} {tuple(value.shape)}, the recipe's [model] {tuple(shape)}"
            )
        return value

    def buffer(self, name: str) -> Tensor | None:
        """No buffer is saved: rotary tables follow from the recipe."""
        return None

    def unused(self) -> list[str]:
        """Tensors in the files that nobody asked for, by their own names."""
        return sorted(theirs for name, (_, theirs) in self.holders.items() if name not in self._asked)

    def _read(self, part: str) -> Tensor:
        file, theirs = self.holders[part]
        self._asked.add(part)
        return file.get_tensor(theirs)

    def _require_tied(self, embedding: str) -> None:
        head = ENDS["head.weight"]
        if head in self.holders and not torch.equal(self._read(head), self._read(embedding)):
            raise CheckpointError(f"{self.folder}: config.json ties head and embedding, and {head} is not {embedding}")


def load(folder: Path) -> Published:
    """The weights of a published checkpoint, to fill a model from. Raises CheckpointError; a pickle is never opened."""
    return Published(folder)


def _files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CheckpointError(f"{folder / INDEX} has no weight_map")
        return [folder / Path(str(name)).name for name in sorted(set(names.values()))]  # never a path out of the folder
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if not pickles:
        raise CheckpointError(f"{folder / SINGLE}: not found")
    raise CheckpointError(
        f'{folder / pickles[0]} is a pickle, which can run code; where you trust it, type: python -c "import torch, safetensors.torch '
        f"as s; s.save_file(torch.load('{pickles[0]}', weights_only=True), '{Path(pickles[0]).stem}.safetensors')\" "
        f"and name the result {SINGLE}"
    )


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


# --- writing


def save(
    state: Mapping[str, Tensor],
    model: ModelConfig,
    folder: Path,
    sequence_length: int,
    mask_id: int,
    eot_id: int,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `state` (by native names, on any device) as config.json and safetensors, in shards of at most `shard_bytes`.

    A tensor larger than that has a shard of its own. Every file is read back and compared before this returns. Raises
    ConfigError where the layout has no place for the model, CheckpointError for missing and unused names, a folder that holds
    weights already, and a failing disk.
    """
    config = published(model, state["embed.weight"].shape[0], sequence_length, mask_id, eot_id)
    tied = {"head.weight"} if model.tied else set()
    names = {*ENDS, *(f"blocks.{index}.{part}.weight" for index in range(model.depth) for part in BLOCK)}
    problems = [f"missing: {', '.join(sorted(names - tied - state.keys()))}"] if names - tied - state.keys() else []
    problems += [f"unused: {', '.join(sorted(state.keys() - names))}"] if state.keys() - names else []
    if problems:
        raise CheckpointError(f"the parameters of the model are not those of LLaDA; {'; '.join(problems)}")
    folder.mkdir(parents=True, exist_ok=True)
    if old := sorted(path.name for path in folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} already holds weights: {', '.join(old)}; give another folder, or remove them")
    sizes_of = {name: state[name].numel() * state[name].element_size() for name in _ordered(state, model)}
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes_of.items():
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    weight_map: dict[str, str] = {}
    for number, own in enumerate(shards, 1):
        file = folder / (SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors")
        weight_map |= dict.fromkeys(_write(file, dict(_split(state, own, model))), file.name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes_of.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _ordered(state: Mapping[str, Tensor], model: ModelConfig) -> list[str]:
    return [name for name in state if not (model.tied and name == "head.weight")]


def _split(state: Mapping[str, Tensor], names: list[str], model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Their names and tensors for some native parameters."""
    key_rows = model.key_value_heads * model.head_dim
    rows = {3: [model.width, key_rows, key_rows], 2: [model.inner, model.inner]}
    for name in names:
        parts = published_names(name)
        value = state[name].detach().cpu()
        pieces = [value] if len(parts) == 1 else value.split(rows[len(parts)])
        for part, piece in zip(parts, pieces, strict=True):
            yield PREFIX + part, piece.clone(memory_format=torch.contiguous_format)


def _write(file: Path, tensors: dict[str, Tensor]) -> list[str]:
    save_file(tensors, file, metadata={"format": "pt"})
    with _opened(file) as written:
        same = set(written.keys()) == tensors.keys() and all(
            torch.equal(written.get_tensor(name).view(torch.uint8), tensor.view(torch.uint8))
            for name, tensor in tensors.items()
        )
    if not same:
        raise CheckpointError(f"{file} does not hold what was written; is the disk full?")
    return list(tensors)
