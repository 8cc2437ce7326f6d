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
from torch import Tensor

from gptoughts.engine.checkpoint.parts import TensorFiles
from gptoughts.engine.checkpoint.store import FORMAT, FORMAT_PARTS, STATE, Snapshot, read_state
from gptoughts.engine.distributed.shards import Part, is_sharded, like, part_of
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
) -> Snapshot | None:
    """Copy weights, optimizer, generators and layer state to the host. `state` is the caller's JSON, stored under `run`.

    Persistent buffers are always included, because they can change without a gradient. A collective: ranks exchange the states of their
    generators. Returns None on ranks that write nothing; with sharded weights each rank writes its part.
    """
    ranks = engine.ranks
    generators, words = _generators(engine)
    split = (["model"] if is_sharded(engine.bare) else []) + (["optimizer"] if is_split(engine) else [])
    if not (ranks.first or split):
        return None
    with torch.no_grad(), engine.eval_context():
        held = _Host(ranks.first)
        for name, parameter in engine.bare.named_parameters():
            if weights == "all" or parameter.requires_grad:
                held.add(name, parameter)
        for name, buffer in _persistent_buffers(engine):
            held.add(name, buffer)
        moments, numbers = _optimizer_state(engine)
    extras, plain = _extras(engine)
    copied = {"model": held, "optimizer": moments}
    ranges = {stem: copied[stem].ranges for stem in split}
    if not ranks.first:
        parts = {stem: copied[stem].tensors for stem in split}
        return Snapshot(step, parts, {}, {}, ranks.world.rank, ranks.size, ranges)
    tensors: dict[str, dict[str, Tensor]] = {stem: host.tensors for stem, host in copied.items()}
    written = {
        "format": FORMAT_PARTS if split and ranks.size > 1 else FORMAT,
        "step": step,
        "weights": weights,
        "buffers": [name for name, _ in _persistent_buffers(engine)],
        "run": dict(state),
        "optimizer": numbers,
        "layers": plain,
        "generators": words,
    }
    return Snapshot(
        step,
        {**tensors, "state": {**extras, **generators}},
        {**documents, "state.json": json.dumps(written, indent=1)},
        folders,
        0,
        ranks.size if split else 1,
        ranges,
    )


def is_split(engine: Engine) -> bool:
    """Return whether ranks hold different parts of weights or optimizer state, so that each writes its own."""
    return is_sharded(engine.bare) or getattr(engine.optimizer, "shards_state", False)


class _Host:
    """Tensors copied to the host: whole ones on rank 0, of sharded ones this rank's part."""

    def __init__(self, writes_whole: bool) -> None:
        self._writes_whole = writes_whole
        self.tensors: dict[str, Tensor] = {}
        self.ranges: dict[str, tuple[int, tuple[int, ...]]] = {}

    def add(self, name: str, tensor: Tensor | Part) -> None:
        """Copy `tensor` if this rank writes it."""
        part = part_of(tensor)
        if part is None:
            assert isinstance(tensor, Tensor)
            if self._writes_whole:
                self.tensors[name] = _host(tensor)
        elif part.is_first_copy and part.value.numel():
            self.tensors[name], self.ranges[name] = _host(part.value), (part.start, part.shape)


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _persistent_buffers(engine: Engine) -> list[tuple[str, Tensor]]:
    held = engine.bare.state_dict().keys()
    return [(name, buffer) for name, buffer in engine.bare.named_buffers() if name in held]


def _names(engine: Engine) -> dict[int, str]:
    return {id(parameter): name for name, parameter in engine.bare.named_parameters()}


def _optimizer_state(engine: Engine) -> tuple[_Host, dict[str, Any]]:
    tensors = _Host(engine.ranks.first)
    if engine.optimizer is None:
        return tensors, {}
    names = _names(engine)
    numbers: dict[str, Any] = {}
    for parameter, values in engine.optimizer.state.items():
        kept = engine.optimizer.stored(parameter) if isinstance(engine.optimizer, CustomStateOptimizer) else values
        for key, value in kept.items():
            place = f"{names[id(parameter)]}/{key}"
            if isinstance(value, Tensor | Part):
                tensors.add(place, value)
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


def _generators(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the states of torch's generators on all ranks, and of NumPy's and Python's on this one. A collective."""
    device, ranks = engine.device, engine.ranks
    own = {"generator/torch": torch.get_rng_state()}
    if device.type == "cuda":
        own["generator/cuda"] = torch.cuda.get_rng_state(device)
    tensors = {}
    for name, state in own.items():
        for rank, other in enumerate(ranks.gather(state)):
            tensors[_of_rank(name, rank)] = other
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    words = {
        "numpy": [str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), gauss_next],
        "ranks": ranks.size,
    }
    return tensors, words


def _of_rank(name: str, rank: int) -> str:
    return f"{name}/{rank}" if rank else name


def restore(engine: Engine, folder: Path) -> dict[str, Any]:
    """Restore optimizer, generators and layer state from a checkpoint. Returns the caller's state.

    Weights are restored before, by `materialize(Weights(folder))`. Raises CheckpointError where the optimizer differs. With another number
    of ranks than the checkpoint's, only rank 0 continues its generators; the others keep those seeded by rank and step.
    """
    state = read_state(folder)
    with torch.no_grad(), engine.eval_context():
        _restore_optimizer(engine, TensorFiles(folder, "optimizer"), state["optimizer"], folder)
    files = TensorFiles(folder, "state")
    kept = {name: files.tensor(name) for name in files.names()}
    for layer, stateful in engine.extras.items():
        prefix = f"layer/{layer}/"
        mine = {key.removeprefix(prefix): value for key, value in kept.items() if key.startswith(prefix)}
        stateful.load_state_dict({**mine, **state["layers"].get(layer, {})})
    saved_ranks, rank = state["generators"].get("ranks", 1), engine.ranks.world.rank
    if rank and saved_ranks != engine.ranks.size:
        return dict(state["run"])
    torch.set_rng_state(kept[_of_rank("generator/torch", rank)])
    if engine.device.type == "cuda" and _of_rank("generator/cuda", rank) in kept:
        torch.cuda.set_rng_state(kept[_of_rank("generator/cuda", rank)], engine.device)
    if engine.ranks.first:
        restore_host_generators(state["generators"], folder)
    return dict(state["run"])


def restore_host_generators(saved: Mapping[str, Any], folder: Path) -> None:
    """Set NumPy's and Python's generators. Raises CheckpointError for a state that they do not take."""
    try:
        kind, keys, position, has_gauss, gauss = saved["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
        version, internal, gauss_next = saved["python"]
        random.setstate((version, tuple(internal), gauss_next))
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{folder / STATE}: no state of NumPy's and Python's generators ({error})", fix="an earlier checkpoint"
        ) from None


def _restore_optimizer(engine: Engine, files: TensorFiles, numbers: Mapping[str, Any], folder: Path) -> None:
    if engine.optimizer is None or not numbers:
        return
    _check_maker(engine, numbers, folder)
    saved: dict[str, list[str]] = defaultdict(list)
    for place in (*numbers["values"], *files.names()):
        saved[place.rpartition("/")[0]].append(place)
    names = _names(engine)
    missing = set(saved) - set(names.values())
    if missing:
        raise CheckpointError(
            f"{folder}: its optimizer state has parameters that the model lacks", found=", ".join(sorted(missing)[:5])
        )
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:
            places = saved.get(names[id(parameter)], [])
            values = {
                place.rpartition("/")[2]: files.tensor(place) if place in files else numbers["values"][place]
                for place in places
            }
            if values and isinstance(engine.optimizer, CustomStateOptimizer):
                engine.optimizer.take(parameter, values)
            elif values:
                engine.optimizer.state[parameter] = {
                    key: _placed(key, value, group, parameter) for key, value in values.items()
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


def _placed(key: str, value: Any, group: Mapping[str, Any], parameter: Tensor) -> Any:
    """Return `value` where its optimizer expects it: sharded as `parameter`; plain AdamW keeps `step` on the host, fused on the device."""
    if not isinstance(value, Tensor) or (key == "step" and value.dim() == 0 and not group.get("fused")):
        return value
    return like(parameter, value) if value.shape == parameter.shape else value.to(parameter.device)


class Weights:
    """Weights of a checkpoint as a source for `materialize`."""

    def __init__(self, folder: Path) -> None:
        self._files = TensorFiles(folder, "model")
        self._left = set(self._files.names())

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return the saved value of `name`, or None."""
        if name not in self._files:
            return None
        self._left.discard(name)
        return self._files.tensor(name)

    def buffer(self, name: str) -> Tensor | None:
        """Return the saved value of a persistent buffer, or None."""
        return self.tensor(name, torch.Size())

    def unused(self) -> list[str]:
        """Return the saved names that were not read."""
        return sorted(self._left)
