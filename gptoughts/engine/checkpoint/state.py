"""Save and restore the training state of an engine: weights, optimizer, random generators, layer state.

Tensors are stored as safetensors under flattened names; numbers, tuples and None as JSON. No pickle.

Saving and restoring run inside `eval_context`: a checkpoint holds the weights that evaluation uses. An optimizer that trains other
weights, such as schedule-free, keeps those in its state there.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from gptoughts.engine.checkpoint.store import FORMAT, Snapshot, read_state
from gptoughts.engine.engine import Engine
from gptoughts.engine.optim.param_groups import GROUP_STATE, CustomStateOptimizer
from gptoughts.errors import CheckpointError

Which = Literal["all", "trained"]
"""Which weights a checkpoint holds. `trained` omits frozen ones, which an adapter loads from its base."""


def snapshot(
    engine: Engine,
    step: int,
    state: Mapping[str, Any],
    documents: Mapping[str, str],
    folders: Mapping[str, Path],
    weights: Which = "all",
) -> Snapshot:
    """Copy weights, optimizer, generators and layer state to the host. `state` is the caller's JSON, stored under `run`.

    Persistent buffers are always included, because they can change without a gradient.
    """
    with torch.no_grad(), engine.eval_context():
        held = {
            name: _host(parameter)
            for name, parameter in engine.bare.named_parameters()
            if weights == "all" or parameter.requires_grad
        }
        held |= {name: _host(buffer) for name, buffer in _persistent_buffers(engine)}
        moments, numbers = _optimizer_state(engine)
    extras, plain = _extras(engine)
    generators, words = _generators(engine.device)
    written = {
        "format": FORMAT,
        "step": step,
        "weights": weights,
        "run": dict(state),
        "optimizer": numbers,
        "layers": plain,
        "generators": words,
    }
    return Snapshot(
        step,
        {"model": held, "optimizer": moments, "state": {**extras, **generators}},
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
        kept = engine.optimizer.stored(parameter) if isinstance(engine.optimizer, CustomStateOptimizer) else values
        for key, value in kept.items():
            place = f"{names[id(parameter)]}/{key}"
            if isinstance(value, Tensor):
                tensors[place] = _host(value)
            else:
                numbers[place] = value
    groups = [{key: group[key] for key in GROUP_STATE if key in group} for group in engine.optimizer.param_groups]
    return tensors, {"values": numbers, "groups": groups, "made_by": _made_by(engine)}


def _made_by(engine: Engine) -> dict[str, Any]:
    """Return what a saved state must match: the optimizer's name, its implementation, and options that change state shapes."""
    optim = engine.recipe.optim
    shape = {"rank": optim.rank} if optim.name == "apollo" else {}
    made = engine.optimizer
    return {
        "name": optim.name,
        "class": made.made_by if isinstance(made, CustomStateOptimizer) else type(made).__name__,
        **shape,
    }


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
    """Restore optimizer, generators and layer state from a checkpoint. Returns the caller's state.

    Weights are restored before, by `materialize(Weights(folder))`. Raises CheckpointError where the optimizer differs.
    """
    state = read_state(folder)
    with torch.no_grad(), engine.eval_context():
        _restore_optimizer(engine, _tensors(folder / "optimizer.safetensors"), state["optimizer"], folder)
    kept = _tensors(folder / "state.safetensors")
    for layer, stateful in engine.extras.items():
        prefix = f"layer/{layer}/"
        mine = {key.removeprefix(prefix): value for key, value in kept.items() if key.startswith(prefix)}
        stateful.load_state_dict({**mine, **state["layers"].get(layer, {})})
    if not engine.ranks.first:
        return dict(state["run"])  # only rank 0's generators were saved; the others are seeded by rank and step
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
    _check_maker(engine, numbers, folder)
    saved: dict[str, dict[str, Any]] = defaultdict(dict)
    for place, value in [*numbers["values"].items(), *tensors.items()]:
        name, _, key = place.rpartition("/")
        saved[name][key] = value
    names = _names(engine)
    missing = set(saved) - set(names.values())
    if missing:
        raise CheckpointError(
            f"{folder}: its optimizer state has parameters that the model lacks", found=", ".join(sorted(missing)[:5])
        )
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:
            values = saved.get(names[id(parameter)])
            if values and isinstance(engine.optimizer, CustomStateOptimizer):
                engine.optimizer.take(parameter, values)
            elif values:
                engine.optimizer.state[parameter] = {
                    key: _placed(key, value, group, parameter.device) for key, value in values.items()
                }
    for group, kept in zip(engine.optimizer.param_groups, numbers.get("groups", []), strict=False):
        group.update(kept)


def _check_maker(engine: Engine, numbers: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError where another optimizer wrote the state; the oldest checkpoints name none."""
    assert engine.optimizer is not None
    now, groups = _made_by(engine), len(engine.optimizer.param_groups)
    differing = [f"  {key}: {old} | {now.get(key)}" for key, old in numbers.get("made_by", {}).items() if old != now.get(key)]
    if not differing and len(numbers.get("groups", [])) not in (0, groups):
        differing = [f"  parameter groups: {len(numbers['groups'])} | {groups}"]
    if differing:
        raise CheckpointError(
            f"{folder}: state of another optimizer (checkpoint | now)\n" + "\n".join(differing),
            fix="--name NAME to start a new run",
        )


def _placed(key: str, value: Any, group: Mapping[str, Any], device: torch.device) -> Any:
    """Return `value` on the device that its optimizer expects: plain AdamW keeps `step` on the host, fused AdamW on the device."""
    if not isinstance(value, Tensor) or (key == "step" and value.dim() == 0 and not group.get("fused")):
        return value
    return value.to(device)


class Weights:
    """Weights of a checkpoint as a source for `materialize`."""

    def __init__(self, folder: Path) -> None:
        self._file = safe_open(folder / "model.safetensors", framework="pt")
        self._left = set(self._file.keys())

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return the saved value of `name`, or None."""
        if name not in self._file.keys():  # noqa: SIM118  # not a dict
            return None
        self._left.discard(name)
        return self._file.get_tensor(name)

    def buffer(self, name: str) -> Tensor | None:
        """Return the saved value of a persistent buffer, or None."""
        return self.tensor(name, torch.Size())

    def unused(self) -> list[str]:
        """Return the saved names that were not read."""
        return sorted(self._left)


def _tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
