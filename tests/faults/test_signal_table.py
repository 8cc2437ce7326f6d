"""Signals in phases of a training, on one rank and two: exit code, time, checkpoint, and equal bits after resuming (see signal_table.py)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.harness import Runs, can_compile, prepare
from tests.faults.signal_table import LINES, PHASES, SIGNALS, Phase, to_markdown, try_cell

IN_CI = {("validation", 0), ("sampling", 1), ("watched step", 2), ("writing a checkpoint, 2 ranks", 3), ("training", 4)}
"""Phase and number of the signal that every run of the slow tier tries; the long set tries all."""


def _cells() -> list[Any]:
    cells = []
    for phase in PHASES:
        for number, signals in enumerate(SIGNALS):
            mark = pytest.mark.slow if (phase.title, number) in IN_CI else pytest.mark.long
            cells.append(pytest.param(phase, signals, marks=mark, id=f"{phase.title}-{signals}"))
    return cells


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    if not can_compile():
        pytest.skip("the library of faults needs Linux and gcc")
    return prepare(tmp_path_factory.mktemp("signals"), LINES)


@pytest.mark.parametrize(("phase", "signals"), _cells())
def test_the_run_ends_as_promised_and_goes_on(long_text: Runs, phase: Phase, signals: str) -> None:
    cell = try_cell(long_text, phase, signals)
    assert not cell.faults, to_markdown([cell], "this test")
