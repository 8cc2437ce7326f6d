"""Runs that are made slow in a known way name it, and propose what was taken away."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.limiter import CASES, found, launch, pairs, train


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
