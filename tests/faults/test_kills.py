"""Kill -9 at named points of the code, on one rank and on two: the run that is continued makes the bits of the unbroken one.

`python -m tests.faults.soak --kills 200` does it at random points and system calls.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.harness import SINGLE, VARIANTS, Fault, Runs, Variant, same, steps_of
from tests.faults.points import POINTS
from tests.support.tiers import slow_except

CHAINS = {
    "single": ["tokenizing:1", "build:1", "loader:3", "step:5", "restore:1", "optimizer:2", "evaluation:1", "snapshot:2", "sampling:1"],
    "compiled": ["numerics check:1", "compilation:1", "step:7", "end:1"],
    "ddp": ["numerics check:1", "step:5", "snapshot:1"],
    "fsdp2": ["step:5", "restore:1", "evaluation:1"],
}  # fmt: skip
"""Variant -> where each life of one run is killed."""


def test_every_point_is_tried() -> None:
    assert {order.partition(":")[0] for chain in CHAINS.values() for order in chain} == set(POINTS)
    assert set(CHAINS) == {variant.name for variant in VARIANTS}


@pytest.mark.parametrize("variant", slow_except(VARIANTS, SINGLE), ids=lambda variant: variant.name)
def test_killed_at_one_point_after_another(runs: Runs, tmp_path: Path, variant: Variant) -> None:
    unbroken = runs.run_ranks(tmp_path / "unbroken", variant)
    assert not any(unbroken.codes), unbroken.said
    for number, order in enumerate(CHAINS[variant.name]):
        rank = number % variant.ranks
        life = runs.run_ranks(tmp_path / "run", variant, [Fault("", f"{order}:0", rank, at_point=True)])
        assert life.codes[rank] == -9 and life.struck == [f"point {order.partition(':')[0]}"], (order, life)
        assert "Traceback" not in life.said, life.said
        made = steps_of(tmp_path / "run")
    life = runs.run_ranks(tmp_path / "run", variant)
    assert not any(life.codes) and "Traceback" not in life.said, life.said
    assert made and same(tmp_path / "run", tmp_path / "unbroken")
