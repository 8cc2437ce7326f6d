"""Spread of measurements, and the file of figures: updated in place, never lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptoughts.diagnostics.bench.figures import keep, paired, spread
from gptoughts.errors import ConfigError


def test_spread_and_pairs() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "min": 1.0, "max": 5.0, "q1": 2.0, "q3": 4.0}
    assert paired([2.0, 9.0, 2.0], [1.0, 3.0, 2.0])["median"] == 2.0


def test_a_file_keeps_other_runs_and_replaces_its_own(tmp_path: Path) -> None:
    path = tmp_path / "new" / "step.json"
    for run in ({"recipe": "a", "figure": 1}, {"recipe": "b", "figure": 2}, {"recipe": "a", "figure": 3}):
        keep(path, run, ("recipe",))
    assert json.loads(path.read_text())["runs"] == [{"recipe": "b", "figure": 2}, {"recipe": "a", "figure": 3}]


def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="not a file of measurements"):
        keep(path, {}, ("recipe",))
    assert path.read_text(encoding="utf-8") == "mine"
