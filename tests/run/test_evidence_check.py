"""The watched step is one that moves weights: a schedule may end with the rate 0."""

from __future__ import annotations

import json
from pathlib import Path

from gptoughts.console import SilentConsole
from gptoughts.engine.trainer import Progress
from gptoughts.layers import CATALOG
from gptoughts.run.evidence import EvidenceCheck
from tests.support.engines import engine_of, plan_of, recipe_of


def check(tmp_path: Path, rates: list[float]) -> tuple[EvidenceCheck, dict[str, object]]:
    """Train one step per rate; return the check and evidence.json."""
    recipe = recipe_of("modern")
    plan = plan_of(recipe, {"optimizer": "fused"})
    with engine_of(recipe, plan) as engine:
        found = EvidenceCheck(plan, CATALOG, engine.ranks, SilentConsole(), tmp_path)
        found.run(engine, Progress(), lambda now: now.step >= len(rates), lambda now: rates[now.step])
        if not found.evidence:
            found.report_unwatched()
    return found, json.loads((tmp_path / "evidence.json").read_text(encoding="utf-8"))


def test_a_step_with_the_rate_zero_proves_nothing_and_stops_nothing(tmp_path: Path) -> None:
    found, written = check(tmp_path, [0.0])
    assert not found.evidence
    assert written["step"] is None


def test_the_first_step_that_moves_weights_is_watched(tmp_path: Path) -> None:
    found, written = check(tmp_path, [0.0, 1e-3, 1e-3])
    assert written["step"] == 2
    assert all(line.evidence.status == "active" for line in found.evidence if line.layer == "fused")
