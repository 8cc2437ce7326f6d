"""Which ranks sample, and how their readings become one row."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.hardware.world import World
from gptoughts.run.tracking.metrics import GATHERED, METRICS
from gptoughts.run.tracking.sink import Sink
from gptoughts.run.tracking.system import Peer, SystemMetrics, sampling_ranks, summary
from gptoughts.run.tracking.wandb_workspace import SECTIONS, definition, workspace


def peer(node: str, own: bool = False) -> Peer:
    return Peer(node, 1, 0, own, "")


def test_one_rank_per_node_samples_or_each_that_sees_only_its_own_gpus() -> None:
    assert sampling_ranks([peer("a")]) == [0]
    assert sampling_ranks([peer("a"), peer("a"), peer("b"), peer("b")]) == [0, 2]
    assert sampling_ranks([peer("a"), peer("b"), peer("a"), peer("b")]) == [0, 1], "ranks dealt out round robin"
    assert sampling_ranks([peer("a", own=True), peer("a", own=True)]) == [0, 1]


def test_mean_extremes_and_who_has_them() -> None:
    row = summary(
        {
            "gpu/utilization": {0: 50.0, 1: 90.0, 2: 10.0},
            "gpu/throttle": {0: ["power cap"], 1: [], 2: ["heat (software)", "power cap"]},
            "gpu/energy_joules": {0: 5.0, 1: 7.0},
            "cpu/process_percent": {0: 100.0, 1: 20.0},
            "cpu/load": {0: 2.5},
        }
    )
    assert row == {
        "gpu/count": 3,
        "gpu/utilization": 50.0,
        "gpu/utilization_min": 10.0,
        "gpu/utilization_max": 90.0,
        "gpu/utilization_min_rank": 2,
        "gpu/utilization_max_rank": 1,
        "gpu/throttle": ["heat (software)", "power cap"],
        "gpu/energy_joules": 12.0,
        "cpu/process_percent": 60.0,
        "cpu/process_percent_min": 20.0,
        "cpu/process_percent_max": 100.0,
        "cpu/process_percent_min_rank": 1,
        "cpu/process_percent_max_rank": 0,
        "cpu/load": 2.5,
    }
    assert summary({"gpu/power_watts": {0: 300.0}})["gpu/power_watts_max_rank"] == 0, "one GPU has the same keys"
    assert summary({}) == {}


class Rows(Sink):
    """Keeps samples."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, Any]] = []

    def sample(self, index: int, values: Any) -> None:
        self.rows.append((index, values))


def test_other_nodes_leave_their_samples_in_the_store_and_a_late_one_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    store, kept = dist.HashStore(), Rows()
    ranks = [Ranks(World(rank, 0, 4, 2, "torchrun"), torch.device("cpu")) for rank in (0, 2)]
    first, second = (SystemMetrics(one, kept, 10, samples_before=7) for one in ranks)
    for one in (first, second):
        one._store, one._samplers = store, [0, 2]
    first.due(5, False)
    first._share({"cpu/load": {0: 2.0}})
    second._share({"cpu/load": {2: 4.0}})
    first._share({"cpu/load": {0: 2.0}})
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 31)
    first._share({"cpu/load": {0: 2.0}})
    assert [(index, values["step"], values["cpu/load"]) for index, values in kept.rows] == [
        (8, 5, 2.0),
        (9, 5, 3.0),
        (10, 5, 2.0),
    ]
    assert kept.rows[1][1]["cpu/load_max_rank"] == 2


def test_every_sampled_key_is_in_the_table_of_metrics() -> None:
    known = {metric.key for metric in METRICS if metric.axis == "sample"}
    source = (Path(__file__).parents[3] / "gptoughts" / "hardware" / "gpu_sampler.py").read_text()
    keys = {f"gpu/{key}" for key in re.findall(r'^    "(\w+)": lambda', source, re.MULTILINE)}
    assert len(keys) == 13 and keys <= known


def test_every_panel_of_the_workspace_draws_keys_that_exist() -> None:
    known = {metric.key: metric.axis for metric in METRICS}
    spread = {f"{key}_{end}" for key, axis in known.items() if axis == "sample" for end in GATHERED}
    assert list(SECTIONS) == ["loss", "speed", "GPU", "memory", "data", "evaluation"]
    for panels in definition().values():
        for panel in panels:
            assert set(panel.get("keys", [])) <= known.keys() | spread and panel["x"] in ("step", "sample")
            assert "keys" in panel or panel["pattern"].replace(".*", "*") in known


def test_the_workspace_is_built_by_the_package_without_network() -> None:
    pytest.importorskip("wandb_workspaces")
    made = workspace("team", "project")
    assert {section.name: len(section.panels) for section in made.sections} == {
        name: len(keys) for name, keys in SECTIONS.items()
    }
    text = made._to_model().model_dump_json()
    assert all(f'"{key}"' in text or key.endswith("*") for keys in SECTIONS.values() for key in keys) and "eval/.*" in text
