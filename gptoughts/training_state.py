"""Everything that a resumed run needs, between the engine and a checkpoint: weights, optimiser, generators, layers' memory.

Tensors go to safetensors under flattened names; numbers, tuples and None to JSON. No pickle.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from gptoughts.checkpoint import FORMAT, Snapshot, read_state
from gptoughts.engine import Engine
from gptoughts.errors import CheckpointError


def snapshot(
    engine: Engine, step: int, state: Mapping[str, Any], documents: Mapping[str, str], folders: Mapping[str, Path]
) -> Snapshot:
    """Copy weights, optimiser, generators and layers' memory. `state` is the caller's own JSON, kept under `run`."""
    weights = {name: _host(parameter) for name, parameter in engine.bare.named_parameters()}
    weights |= {name: _host(buffer) for name, buffer in _persistent_buffers(engine)}
    moments, numbers = _optimizer_state(engine)
    extras, plain = _extras(engine)
    generators, words = _generators(engine.device)
    written = {"format": FORMAT, "step": step, "run": dict(state), "optimizer": numbers, "layers": plain, "generators": words}
    return Snapshot(
        step,
        {"model": weights, "optimizer": moments, "state": {**extras, **generators}},
        {**documents, "state.json": json.dumps(written, indent=1)},
        folders,
    )


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _persistent_buffers(engine: Engine) -> list[tuple[str, Tensor]]:
    held = engine.bare.state_dict().keys()
    return [(name, buffer) for name, buffer in engine.bare.named_buffers() if name in held]


def _names(engine: Engine) -> dict[int, str]:
    return {id(parameter): name for name, parameter in engine.bare.named_parameters()}


def _optimizer_state(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if engine.optimizer is None:
        return {}, {}
    names = _names(engine)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for parameter, values in engine.optimizer.state.items():
        for key, value in values.items():
            place = f"{names[id(parameter)]}/{key}"
            if isinstance(value, Tensor):
                tensors[place] = _host(value)
            else:
                numbers[place] = value
    return tensors, {"values": numbers}


def _extras(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for layer, stateful in engine.extras.items():
        for key, value in stateful.state_dict().items():
            if isinstance(value, Tensor):
                tensors[f"layer/{layer}/{key}"] = _host(value)
            else:
                plain.setdefault(layer, {})[key] = value
    return tensors, plain


def _generators(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"generator/torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["generator/cuda"] = torch.cuda.get_rng_state(device)
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    words = {
        "numpy": [str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), gauss_next],
    }
    return tensors, words


def restore(engine: Engine, folder: Path) -> dict[str, Any]:
    """Give the engine the optimiser, generators and layers' memory of a checkpoint. Returns the caller's own state.

    Weights came earlier, through `materialise(Weights(folder))`. Raises CheckpointError where the optimiser does not fit.
    """
    state = read_state(folder)
    _restore_optimizer(engine, _tensors(folder / "optimizer.safetensors"), state["optimizer"], folder)
    kept = _tensors(folder / "state.safetensors")
    for layer, stateful in engine.extras.items():
        prefix = f"layer/{layer}/"
        mine = {key.removeprefix(prefix): value for key, value in kept.items() if key.startswith(prefix)}
        stateful.load_state_dict({**mine, **state["layers"].get(layer, {})})
    if not engine.ranks.first:
        return dict(state["run"])  # the first rank's generators were saved; the others were seeded by rank and step
    torch.set_rng_state(kept["generator/torch"])
    if engine.device.type == "cuda" and "generator/cuda" in kept:
        torch.cuda.set_rng_state(kept["generator/cuda"], engine.device)
    kind, keys, position, has_gauss, gauss = state["generators"]["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["generators"]["python"]
    random.setstate((version, tuple(internal), gauss_next))
    return dict(state["run"])


def _restore_optimizer(engine: Engine, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], folder: Path) -> None:
    if engine.optimizer is None or not numbers:
        return
    held = {place.rpartition("/")[0] for place in [*tensors, *numbers["values"]]}
    here = _names(engine)
    missing = held - set(here.values())
    if missing:
        raise CheckpointError(f"{folder}: the optimiser holds {', '.join(sorted(missing)[:5])}, which this model does not have")
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:
            name = here[id(parameter)]
            values = {
                place.rpartition("/")[2]: value
                for place, value in numbers["values"].items()
                if place.rpartition("/")[0] == name
            }
            for place, tensor in tensors.items():
                if place.rpartition("/")[0] == name:
                    # Fused AdamW keeps its step counter on the device, the plain loop on the host.
                    on_host = tensor.dim() == 0 and not group.get("fused")
                    values[place.rpartition("/")[2]] = tensor if on_host else tensor.to(parameter.device)
            if values:
                engine.optimizer.state[parameter] = values


class Weights:
    """The weights of a checkpoint as a source for `materialise`."""

    def __init__(self, folder: Path) -> None:
        self._file = safe_open(folder / "model.safetensors", framework="pt")
        self._left = set(self._file.keys())

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """The saved value of `name`, or None."""
        if name not in self._file.keys():  # noqa: SIM118  # not a dict
            return None
        self._left.discard(name)
        return self._file.get_tensor(name)

    def buffer(self, name: str) -> Tensor | None:
        """The saved value of a persistent buffer, or None."""
        return self.tensor(name, torch.Size())

    def unused(self) -> list[str]:
        """Names that nobody asked for."""
        return sorted(self._left)


def _tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
