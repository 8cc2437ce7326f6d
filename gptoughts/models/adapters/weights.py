"""The values of an adapted model: the base's under the base's own names, the adapter's saved or drawn."""

from __future__ import annotations

import hashlib

import torch
import torch.nn as nn
from torch import Tensor

from gptoughts.models.adapters.adapter import (
    NAME,
    TRAINED,
    adapter_layers,
    base_name,
    first_value,
    is_trained,
    own_shape,
    row_lengths,
)
from gptoughts.models.adapters.nf4 import PARTS, NF4Linear, is_turned, pack, unpack
from gptoughts.models.family import draw
from gptoughts.models.sources import Source

OVERSAMPLED, POWER_STEPS = 8, 16  # of the range finder; PiSSA's paper takes 16 steps, too


def principal(weight: Tensor, rank: int, scaling: float, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """PiSSA's first A and B (Meng et al. 2024): scaling B A is the part of an out x in weight with its largest singular values.

    By a randomized range finder (Halko et al. 2011) in fp64, where a full decomposition of a wide model takes hours; a pure function of
    its arguments. What it leaves of the weight is exact whatever subspace it found.
    """
    whole = weight.double()
    width = min(rank + OVERSAMPLED, *whole.shape)
    digest = hashlib.sha256(f"{seed}:{name}:pissa".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    guess = torch.randn(whole.shape[1], width, generator=generator, dtype=torch.float64, device="cpu").to(whole.device)
    basis = torch.linalg.qr(whole @ guess).Q
    for _ in range(POWER_STEPS):
        basis = torch.linalg.qr(whole @ torch.linalg.qr(whole.t() @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.t() @ whole, full_matrices=False)
    root = (values[:rank] / scaling).sqrt()
    return (root[:, None] * right[:rank]).float(), (basis @ left[:, :rank] * root).float()


class AdapterSource:
    """An adapted model's values: frozen ones of `base` by the base's own names, trained ones of `saved`, else drawn by (seed, name).

    model    the adapted model, on meta or not; only its shapes are read
    kind     adapter.kind: pissa splits the base's weights, the others leave them
    saved    the trained parameters under the names they have in `model`: a checkpoint, or `adapter_folder.AdapterFolder`
    device   where weights are packed and decomposed; a GPU is a hundred times faster

    Projections pass one at a time, so that a packed base never exists as a whole.
    """

    def __init__(
        self,
        base: Source,
        model: nn.Module,
        kind: str = "lora",
        seed: int = 0,
        saved: Source | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._base, self._kind, self._seed, self._saved = base, kind, seed, saved
        self._device = device or torch.device("cpu")
        self._layers = adapter_layers(model)
        self._projections: dict[str, nn.Module] = {name: layer.base_layer for name, layer in self._layers.items()}
        self._projections |= {base_name(name): part for name, part in model.named_modules() if isinstance(part, NF4Linear)}
        self._starts: dict[str, tuple[Tensor, Tensor]] = {}  # kept, as a base may give each value once only
        self._last: tuple[str, dict[str, Tensor | None]] = ("", {})

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """The value of the parameter `name` of the adapted model."""
        if is_trained(name):
            return self._saved.tensor(name, shape) if self._saved is not None else self._first(name, shape)
        own = base_name(name)
        place, _, field = own.rpartition(".")
        if place in self._projections and field in ("weight", *PARTS):
            return self._parts(place)[field]
        return self._base.tensor(own, shape)

    def buffer(self, name: str) -> Tensor | None:
        """The value of a persistent buffer: as saved with the adapter, else the base's."""
        of_base = self._base.buffer(base_name(name))
        saved = self._saved.buffer(name) if self._saved is not None else None
        return of_base if saved is None else saved

    def unused(self) -> list[str]:
        """Names that the base or the saved adapter holds and nobody asked for."""
        return [*self._base.unused(), *(self._saved.unused() if self._saved is not None else [])]

    def start(self, place: str) -> tuple[Tensor, Tensor]:
        """PiSSA's first A and B of the projection `place`."""
        if place not in self._starts:
            self._parts(place)
        return self._starts[place]

    def _first(self, name: str, shape: torch.Size) -> Tensor | None:
        place, kind = name.partition(".lora_")[0], TRAINED.search(name)[1]  # type: ignore[index]
        parts = self._parts(place)
        if kind in parts:
            return parts[kind]
        if kind != "magnitude_vector":
            first = first_value(name, shape)
            assert first is not None
            return draw(self._seed, name, shape, first)
        module = self._projections[place]
        if isinstance(module, NF4Linear):
            packed, absmax = parts["packed"], parts["absmax"]
            return (
                None if packed is None or absmax is None else row_lengths(unpack(packed, absmax, module.shape, torch.float32))
            )
        weight = parts["weight"]
        return None if weight is None else row_lengths(weight.t() if is_turned(module) else weight)

    def _parts(self, place: str) -> dict[str, Tensor | None]:
        """weight, of a packed projection packed and absmax, for PiSSA A and B; those of the last projection are kept."""
        if self._last[0] != place:
            self._last = (place, {})  # the old one goes first: there is never more than one
            self._last = (place, self._read(place))
        return self._last[1]

    def _read(self, place: str) -> dict[str, Tensor | None]:
        module = self._projections[place]
        weight = self._base.tensor(f"{place}.weight", torch.Size(own_shape(module)))
        parts: dict[str, Tensor | None] = {"weight": weight, **dict.fromkeys(PARTS if isinstance(module, NF4Linear) else ())}
        if weight is None:
            return parts
        splits = self._kind == "pissa" and place in self._layers
        if not splits and not isinstance(module, NF4Linear):
            return parts
        whole = weight.to(self._device)
        whole = whole.t() if is_turned(module) else whole
        if splits:
            layer = self._layers[place]
            scaling = layer.scaling[NAME]
            a, b = principal(whole, layer.r[NAME], scaling, self._seed, place)
            whole = (whole.double() - scaling * (b.double() @ a.double())).to(weight.dtype)
            self._starts[place] = a, b
            parts |= {"A": a, "B": b, "weight": whole.t() if is_turned(module) else whole}
        if isinstance(module, NF4Linear):
            parts["packed"], parts["absmax"] = pack(whole)
        return parts
