"""Parameter values of an adapted model: the base's from its source, the adapter's saved or initialized."""

from __future__ import annotations

import hashlib

import torch
import torch.nn as nn
from torch import Tensor

from gptoughts.models.adapters.adapter import (
    NAME,
    TRAINED,
    adapter_initial,
    adapter_layers,
    base_name,
    base_shape,
    is_trained,
    row_norms,
)
from gptoughts.models.adapters.nf4 import PARTS, NF4Linear, is_turned, pack, unpack
from gptoughts.models.family import draw
from gptoughts.models.sources import Source

OVERSAMPLED, POWER_STEPS = 8, 16  # of the randomized range finder; 16 steps as in the PiSSA paper


def pissa_factors(weight: Tensor, rank: int, scaling: float, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Return PiSSA's initial A and B (Meng et al. 2024): scaling B A is the part of an out x in weight with its `rank` largest singular values.

    Uses a randomized range finder (Halko et al. 2011) in fp64, because full decompositions of a wide model take hours. A pure function
    of its arguments. The residual is computed from A and B, so their product plus the residual is exact for any subspace.
    """
    weight = weight.double()
    width = min(rank + OVERSAMPLED, *weight.shape)
    digest = hashlib.sha256(f"{seed}:{name}:pissa".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    guess = torch.randn(weight.shape[1], width, generator=generator, dtype=torch.float64, device="cpu").to(weight.device)
    basis = torch.linalg.qr(weight @ guess).Q
    for _ in range(POWER_STEPS):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.t() @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.t() @ weight, full_matrices=False)
    root = (values[:rank] / scaling).sqrt()
    return (root[:, None] * right[:rank]).float(), (basis @ left[:, :rank] * root).float()


class AdapterSource:
    """Source of an adapted model: frozen values from `base` by the base's names, trained ones from `saved` or initialized by (seed, name).

    model    the adapted model, on any device; only its shapes are read
    kind     adapter.kind; pissa splits the base's weights
    saved    trained parameters by `model`'s names: a checkpoint, or `folder.AdapterFolder`
    device   where weights are packed and decomposed; a GPU is 100 times faster

    Projections are converted one at a time, so the unpacked base is never in memory at once.
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
        self._projections |= {
            base_name(name): module for name, module in model.named_modules() if isinstance(module, NF4Linear)
        }
        self._initial_factors: dict[str, tuple[Tensor, Tensor]] = {}  # kept, because a base may return each value only once
        self._last: tuple[str, dict[str, Tensor | None]] = ("", {})

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return the value of the parameter `name` of the adapted model."""
        if is_trained(name):
            return self._saved.tensor(name, shape) if self._saved is not None else self._initial(name, shape)
        in_base = base_name(name)
        projection, _, field = in_base.rpartition(".")
        if projection in self._projections and field in ("weight", *PARTS):
            return self._parts(projection)[field]
        return self._base.tensor(in_base, shape)

    def buffer(self, name: str) -> Tensor | None:
        """Return the value of a persistent buffer saved with the adapter, else the base's."""
        of_base = self._base.buffer(base_name(name))
        saved = self._saved.buffer(name) if self._saved is not None else None
        return of_base if saved is None else saved

    def unused(self) -> list[str]:
        """Return names of the base and the saved adapter that were never read."""
        return [*self._base.unused(), *(self._saved.unused() if self._saved is not None else [])]

    def start(self, projection: str) -> tuple[Tensor, Tensor]:
        """Return PiSSA's initial A and B of a projection."""
        if projection not in self._initial_factors:
            self._parts(projection)
        return self._initial_factors[projection]

    def _initial(self, name: str, shape: torch.Size) -> Tensor | None:
        projection, kind = name.partition(".lora_")[0], TRAINED.search(name)[1]  # type: ignore[index]
        parts = self._parts(projection)
        if kind in parts:
            return parts[kind]
        if kind != "magnitude_vector":
            initial = adapter_initial(name, shape)
            assert initial is not None
            return draw(self._seed, name, shape, initial)
        module = self._projections[projection]
        if isinstance(module, NF4Linear):
            packed, absmax = parts["packed"], parts["absmax"]
            return None if packed is None or absmax is None else row_norms(unpack(packed, absmax, module.shape, torch.float32))
        weight = parts["weight"]
        return None if weight is None else row_norms(weight.t() if is_turned(module) else weight)

    def _parts(self, projection: str) -> dict[str, Tensor | None]:
        """Return `weight`, for NF4 `packed` and `absmax`, for PiSSA `A` and `B`. Caches the last projection only."""
        if self._last[0] != projection:
            self._last = (projection, {})  # frees the previous one before the next is read
            self._last = (projection, self._read(projection))
        return self._last[1]

    def _read(self, projection: str) -> dict[str, Tensor | None]:
        module = self._projections[projection]
        weight = self._base.tensor(f"{projection}.weight", torch.Size(base_shape(module)))
        parts: dict[str, Tensor | None] = {"weight": weight, **dict.fromkeys(PARTS if isinstance(module, NF4Linear) else ())}
        if weight is None:
            return parts
        splits = self._kind == "pissa" and projection in self._layers
        if not splits and not isinstance(module, NF4Linear):
            return parts
        oriented = weight.to(self._device)
        oriented = oriented.t() if is_turned(module) else oriented
        if splits:
            layer = self._layers[projection]
            scaling = layer.scaling[NAME]
            a, b = pissa_factors(oriented, layer.r[NAME], scaling, self._seed, projection)
            oriented = (oriented.double() - scaling * (b.double() @ a.double())).to(weight.dtype)
            self._initial_factors[projection] = a, b
            parts |= {"A": a, "B": b, "weight": oriented.t() if is_turned(module) else oriented}
        if isinstance(module, NF4Linear):
            parts["packed"], parts["absmax"] = pack(oriented)
        return parts
