"""The optimizer of a ZeRO run by parameter: settings for DeepSpeed, and this rank's part of the state for proofs and checkpoints.

DeepSpeed flattens each parameter group and gives every rank one range of it: weights to update and moments. What this module reads of
DeepSpeed was checked with version 0.19.8; `places` compares what it finds with the model's weights, so that another layout is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptoughts.engine.distributed.shards import Part, local
from gptoughts.engine.optim.param_groups import GROUP_STATE
from gptoughts.errors import CheckpointError, LayerError
from gptoughts.models.sources import shape_of

COUNT = "step"
"""Key of the number of updates, a scalar also where the parameter is one."""


@dataclass(frozen=True)
class Place:
    """The elements of a parameter in this rank's flat partition of its group."""

    flat: Tensor
    """The partition: float32 weights that this rank updates, and key of their state in the inner optimizer."""
    offset: int
    """Position of the first element in `flat`."""
    start: int
    """Position of the first element in the flattened parameter."""
    numel: int
    """0 where another rank updates the whole parameter."""

    def of(self, flat: Tensor) -> Tensor:
        """Return the parameter's elements in `flat`, or in a moment of its shape."""
        return flat.detach()[self.offset : self.offset + self.numel]


def places(zero: Any, groups: list[dict[str, Any]], stage: int) -> dict[nn.Parameter, Place]:
    """Return where this rank's elements of every trained parameter are. Raises LayerError if DeepSpeed holds other values there."""
    found = _whole_groups(zero, groups) if stage < 3 else _partitions(zero, groups)
    for parameter, place in found.items():
        weight = local(parameter).detach().reshape(-1)
        here = weight[place.start : place.start + place.numel] if stage < 3 else weight[: place.numel]
        if not torch.equal(here.to(place.flat.device), place.of(place.flat)):
            raise LayerError(
                "DeepSpeed: this version lays out its partitions in an order that gptoughts does not know",
                fix="pip install 'deepspeed==0.19.8'",
            )
    return found


def _whole_groups(zero: Any, groups: list[dict[str, Any]]) -> dict[nn.Parameter, Place]:
    """Stages 1 and 2: parameters of a group lie one after the other; each rank has an equal range of all of them."""
    found = {}
    for number, group in enumerate(groups):
        flat, size = zero.single_partition_of_fp32_groups[number], zero.partition_size[number]
        low, reached = dist.get_rank() * size, 0
        for parameter in group["params"]:
            first, last = max(low, reached), min(low + size, reached + parameter.numel())
            held = max(0, last - first)
            found[parameter] = Place(flat, first - low if held else 0, first - reached if held else 0, held)
            reached += parameter.numel()
    return found


def _partitions(zero: Any, groups: list[dict[str, Any]]) -> dict[nn.Parameter, Place]:
    """Stage 3: each parameter is divided on its own, padded to equal ranges."""
    found = {}
    for group in groups:
        for parameter in group["params"]:
            number, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start = min(dist.get_rank() * size, shape_of(parameter).numel())
            found[parameter] = Place(
                zero.fp32_partitioned_groups_flat[number], offset, start, min(size, shape_of(parameter).numel() - start)
            )
    return found


class ZeroOptimizer(torch.optim.Optimizer):
    """The optimizer as the engine sees it: groups of model parameters, with this rank's elements of their state.

    DeepSpeed updates through `inner`, whose groups hold flat partitions; settings and results are copied between the groups.
    """

    shards_state = True

    def __init__(
        self,
        groups: list[dict[str, Any]],
        inner_groups: list[dict[str, Any]],
        inner: torch.optim.Optimizer,
        places: Mapping[nn.Parameter, Place],
    ) -> None:
        self.inner, self.inner_groups, self.places = inner, inner_groups, places
        self.made_by = type(inner).__name__
        super().__init__(groups, {})
        self._group_of = {parameter: group for group in self.param_groups for parameter in group["params"]}

    def step(self, closure: Any = None) -> Any:
        """Refuse: DeepSpeed's engine steps."""
        raise RuntimeError("the update is DeepSpeed's, by the engine's hooks")

    def give_settings(self) -> None:
        """Copy learning rate and other settings to the inner optimizer."""
        for mine, theirs in zip(self.param_groups, self.inner_groups, strict=True):
            theirs.update({key: value for key, value in mine.items() if key != "params"})

    def take_results(self) -> None:
        """Copy what the update changed in the groups, and show the state by parameter."""
        for mine, theirs in zip(self.param_groups, self.inner_groups, strict=True):
            mine.update({key: theirs[key] for key in GROUP_STATE if key in theirs})
        if not self.state:
            for parameter in self.places:
                self._show_state(parameter)

    def _show_state(self, parameter: nn.Parameter) -> None:
        """Set the state of `parameter` to views of this rank's elements; values without elements are the whole group's."""
        place = self.places[parameter]
        self.state[parameter] = {
            key: place.of(value) if _is_flat(value, place) else value
            for key, value in self.inner.state.get(place.flat, {}).items()
            if place.numel or not _is_flat(value, place)
        }

    def partition_bytes(self) -> tuple[int, int]:
        """Return the bytes of weights that this rank updates, and of their moments, each partition once."""
        flats = {id(place.flat): place.flat for place in self.places.values()}.values()
        moments = [value for flat in flats for value in self.inner.state.get(flat, {}).values() if isinstance(value, Tensor)]
        return tuple(sum(one.numel() * one.element_size() for one in some) for some in (flats, moments))  # type: ignore[return-value]

    def stored(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Return the state of `parameter`: this rank's part of tensors, and numbers."""
        place, shape = self.places[parameter], tuple(shape_of(parameter))
        return {
            key: Part(value, place.start, shape) if isinstance(value, Tensor) and value.dim() else value
            for key, value in self.state[parameter].items()
        }

    def take(self, parameter: nn.Parameter, values: Mapping[str, Any]) -> None:
        """Restore what `stored` returned, as whole tensors. Raises CheckpointError where a group's values differ."""
        place, shape = self.places[parameter], shape_of(parameter)
        held = self.inner.state[place.flat]
        for key, value in values.items():
            if key != COUNT and isinstance(value, Tensor) and value.shape == shape:
                flat = held.setdefault(key, torch.zeros_like(place.flat, requires_grad=False))
                place.of(flat).copy_(value.reshape(-1)[place.start : place.start + place.numel])
                continue
            fused = self._group_of[parameter].get("fused")
            placed = value.to(place.flat.device) if isinstance(value, Tensor) and fused else value
            if float(held.setdefault(key, placed)) != float(value):
                raise CheckpointError(
                    f"optimizer state {key}: differs between parameters of one group, which ZeRO updates as one tensor",
                    found=f"{float(held[key]):g} and {float(value):g}",
                    fix="--layer.parallel ddp",
                )
        self._show_state(parameter)


def _is_flat(value: Any, place: Place) -> bool:
    return isinstance(value, Tensor) and value.shape == place.flat.shape
