"""`python -m benchmarks.limiter`: runs that are made slow in a known way name it, and propose what was taken away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.limiter import CASES, ROOT, found, launch, pairs, table, train


@pytest.mark.parametrize(
    ("name", "flags", "advice"),
    [
        ("slow loader", "--train.steps 12 --log.every 2", "--layer.loader prefetch"),
        ("slow disk", "--train.steps 12", "--save.every 4"),
    ],
)
def test_a_run_that_waits_says_for_what(
    name: str, flags: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train(name, tmp_path, pairs(flags))
    made = found(tmp_path / "run")
    assert made["limiter"] == CASES[name].expected, made
    assert made["advice"] == advice


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "advice"), [("many small operators", "--layer.microbatch whole"), ("slow rank", "gptoughts doctor")]
)
def test_a_run_that_is_slow_in_other_ways_says_so(name: str, advice: str, tmp_path: Path) -> None:
    made = launch(name, tmp_path)
    assert made["limiter"] == CASES[name].expected, made
    assert made["advice"] == advice


def test_the_table_of_the_page_is_the_measured_one() -> None:
    """Fix a difference by pasting the output of `table` between the markers."""
    (run,) = json.loads((ROOT / "docs" / "measurements" / "cpu" / "limiter.json").read_text(encoding="utf-8"))["runs"]
    page = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
    assert page.split("<!-- limiter -->\n")[1].split("<!-- /limiter -->")[0] == table(run["cases"])
    assert all(set(case["limiter"]) == {case["expected"]} for case in run["cases"].values())
