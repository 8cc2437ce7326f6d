"""Where DeepSpeed keeps a rank's elements: every element once over all ranks, and an error where a version lays them out otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gptoughts.engine.distributed.shards import Part
from gptoughts.errors import CheckpointError, LayerError
from gptoughts.layers.support import several_ranks
from gptoughts.layers.support.zero_optimizer import ZeroOptimizer, places

SHAPES = st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=4)


def whole_groups(groups: list[dict[str, Any]], rank: int, ranks: int) -> SimpleNamespace:
    """What stages 1 and 2 hold on a rank: an equal range of each group's flattened, padded parameters."""
    flats = []
    for group in groups:
        values = torch.cat([one.detach().reshape(-1) for one in group["params"]])
        padded = nn.functional.pad(values, (0, -len(values) % (2 * ranks)))
        flats.append(padded.chunk(ranks)[rank].clone())
    return SimpleNamespace(single_partition_of_fp32_groups=flats, partition_size=[len(flat) for flat in flats])


def groups_of(shapes: list[list[list[int]]]) -> list[dict[str, Any]]:
    return [{"params": [nn.Parameter(torch.randn(shape)) for shape in some]} for some in shapes]


@given(st.lists(SHAPES, min_size=1, max_size=2), st.integers(1, 5))
def test_ranks_hold_every_element_once(shapes: list[list[list[int]]], ranks: int) -> None:
    groups = groups_of(shapes)
    found: dict[nn.Parameter, list[tuple[int, torch.Tensor]]] = {}
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(ranks):
            patch.setattr(dist, "get_rank", lambda rank=rank: rank)
            for parameter, place in places(whole_groups(groups, rank, ranks), groups, 2).items():
                found.setdefault(parameter, []).append((place.start, place.of(place.flat)))
    for group in groups:
        for parameter in group["params"]:
            parts = [part for _, part in sorted(found[parameter], key=lambda one: one[0]) if part.numel()]
            assert torch.equal(torch.cat(parts), parameter.detach().reshape(-1))


def test_another_layout_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    groups = groups_of([[[3, 2], [4]]])
    turned = [{"params": groups[0]["params"][::-1]}]
    with pytest.raises(
        LayerError, match=r"(?s)lays out its partitions in an order that gptoughts does not know.*deepspeed==0.19.8"
    ):
        places(whole_groups(turned, 0, 2), groups, 2)


@pytest.fixture
def optimizer(monkeypatch: pytest.MonkeyPatch) -> ZeroOptimizer:
    """The second of two ranks, which updates the end of a matrix and a scalar."""
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    groups = groups_of([[[3, 2], []]])
    zero = whole_groups(groups, 1, 2)
    inner = torch.optim.AdamW([{"params": zero.single_partition_of_fp32_groups}])
    return ZeroOptimizer(groups, list(inner.param_groups), inner, places(zero, groups, 2))


def test_state_is_taken_and_stored_by_parameter(optimizer: ZeroOptimizer) -> None:
    matrix, scalar = optimizer.param_groups[0]["params"]
    moments = {matrix: torch.arange(6.0).view(3, 2), scalar: torch.tensor(9.0)}
    for parameter, value in moments.items():
        optimizer.take(parameter, {"step": torch.tensor(3.0), "exp_avg": value})
    stored = {parameter: optimizer.stored(parameter) for parameter in moments}
    for parameter, value in moments.items():
        part = stored[parameter]["exp_avg"]
        assert isinstance(part, Part) and part.shape == tuple(value.shape)
        assert torch.equal(part.value, value.reshape(-1)[part.start : part.start + part.value.numel()])
        assert stored[parameter]["step"] == 3.0
    assert (stored[matrix]["exp_avg"].start, stored[matrix]["exp_avg"].value.numel()) == (4, 2)
    assert stored[scalar]["exp_avg"].value.tolist() == [9.0], "a parameter without dimensions is not a count of updates"


def test_counts_that_differ_inside_a_group_are_refused(optimizer: ZeroOptimizer) -> None:
    matrix, scalar = optimizer.param_groups[0]["params"]
    optimizer.take(matrix, {"step": torch.tensor(3.0)})
    with pytest.raises(CheckpointError, match=r"step: differs between parameters of one group.*3 and 2"):
        optimizer.take(scalar, {"step": torch.tensor(2.0)})


def test_settings_reach_the_inner_optimizer_and_it_alone_steps(optimizer: ZeroOptimizer) -> None:
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.give_settings()
    assert optimizer.inner.param_groups[0]["lr"] == 0.25
    assert optimizer.inner.param_groups[0]["params"] is not optimizer.param_groups[0]["params"]
    with pytest.raises(RuntimeError, match="DeepSpeed"):
        optimizer.step()


def test_offload_is_proven_by_where_tensors_lie() -> None:
    here, elsewhere = torch.zeros(2), torch.zeros(2, device="meta")
    assert several_ranks.outside_host_memory([here, here]) == ""
    assert several_ranks.outside_host_memory([here, elsewhere]) == "1 tensors lie on meta, not in host memory"
