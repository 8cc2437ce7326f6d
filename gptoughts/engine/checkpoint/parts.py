"""Checkpoint tensors that are split over ranks: one file per rank, each with the ranges it holds, and reading them as whole tensors.

`model.safetensors` holds whole tensors. With sharded weights there are `model-00001-of-00004.safetensors` and so on; the metadata key
`parts` of each maps a name to [first element in the flattened tensor, shape of the whole tensor]. Names without an entry are whole.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from gptoughts.errors import CheckpointError
from gptoughts.files import parse_json
from gptoughts.models.weight_files import opened

METADATA = "parts"

Ranges = Mapping[str, tuple[int, tuple[int, ...]]]
"""Name -> (first element, shape of the whole tensor), of the tensors of which a file holds a part."""


def file_name(stem: str, rank: int = 0, ranks: int = 1) -> str:
    """Return the file of one rank: `model.safetensors`, or `model-00002-of-00004.safetensors`."""
    return f"{stem}.safetensors" if ranks == 1 else _part_name(stem, rank, ranks)


def _part_name(stem: str, rank: int, ranks: int) -> str:
    return f"{stem}-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def metadata(ranges: Ranges) -> dict[str, str]:
    """Return the metadata of a safetensors file with these ranges: one key, because safetensors writes several in a random order."""
    if not ranges:
        return {"format": "pt"}
    return {METADATA: json.dumps({name: [start, list(shape)] for name, (start, shape) in ranges.items()})}


@dataclass(frozen=True)
class _Place:
    """Where a part of a tensor is."""

    file: int
    start: int


class TensorFiles:
    """All tensors of one stem of a checkpoint, whole, read one at a time."""

    def __init__(self, folder: Path, stem: str) -> None:
        """Open the files. Raises CheckpointError where one is missing or unreadable, or a tensor has gaps."""
        self.folder, self.stem = folder, stem
        self._files = [opened(path) for path in _paths(folder, stem)]
        self._places: dict[str, list[_Place]] = defaultdict(list)
        self._shapes: dict[str, tuple[int, ...]] = {}
        for number, file in enumerate(self._files):
            self._add(number, file)

    def _add(self, number: int, file: Any) -> None:
        try:
            ranges = parse_json((file.metadata() or {}).get(METADATA, "{}"))
            for name in file.keys():  # noqa: SIM118  # not a dict
                start, shape = ranges.get(name, (0, file.get_slice(name).get_shape()))
                self._places[name].append(_Place(number, int(start)))
                known = self._shapes.setdefault(name, tuple(map(int, shape)))
                if known != tuple(shape):
                    raise ValueError(f"{name} has shape {list(known)} in one file and {list(shape)} in another")
        except (ValueError, TypeError, AttributeError, OverflowError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder}: parts of {self.stem} cannot be read: {error}") from None

    def names(self) -> Iterator[str]:
        """Yield the names of all tensors."""
        yield from self._shapes

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the whole tensor."""
        return self._shapes[name]

    def parts(self, name: str) -> Iterator[Tensor]:
        """Yield the parts of a tensor as they are stored."""
        for place in self._places[name]:
            yield self._files[place.file].get_tensor(name)

    def tensor(self, name: str) -> Tensor:
        """Return the whole tensor. Raises CheckpointError where its parts overlap or leave gaps."""
        places, shape = sorted(self._places[name], key=lambda place: place.start), self._shapes[name]
        parts = [self._files[place.file].get_tensor(name) for place in places]
        if len(parts) == 1 and tuple(parts[0].shape) == shape:
            return parts[0]
        reached = 0
        for place, part in zip(places, parts, strict=True):
            if place.start != reached:
                raise CheckpointError(
                    f"{self.folder}: {name} has {'a gap' if place.start > reached else 'overlapping parts'}",
                    found=f"a part at element {place.start}, expected {reached}",
                )
            reached += part.numel()
        if reached != prod(shape):
            raise CheckpointError(f"{self.folder}: {name} is incomplete", found=f"{reached} of {prod(shape)} elements")
        return torch.cat([part.reshape(-1) for part in parts]).view(shape)


def _paths(folder: Path, stem: str) -> list[Path]:
    single = folder / file_name(stem)
    if single.is_file():
        return [single]
    found = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
    count = found[0].stem.rpartition("-")[2] if found else "0"
    expected = [folder / _part_name(stem, rank, int(count)) for rank in range(int(count) if count.isdecimal() else 0)]
    if not found or found != expected:
        raise CheckpointError(
            f"{folder}: {stem} is incomplete", found=", ".join(path.name for path in found[:5]) or f"no {single.name}"
        )
    return found
