"""`python -m benchmarks.strategies`: what is compared is what was asked for, and the figures are complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.strategies import ALONE, STRATEGIES, Strategy, main, table


def test_mpi_starts_ranks_by_mpirun_and_others_by_our_own_flag() -> None:
    assert Strategy("x", 2, "ddp").command(["r"])[-4:] == ["--layer.parallel", "ddp", "--ranks", "2"]
    command = Strategy("x", 4, "ddp", mpi=True).command(["r"])
    assert command[0] == "mpirun" and command[-2:] == ["--collectives", "mpi"] and "--ranks" not in command


def test_what_was_not_run_is_not_available() -> None:
    text = table({"GPT": {ALONE.name: {"difference": 0.0}, STRATEGIES[1].name: {"difference": 4.8e-07}}})
    assert f"| {STRATEGIES[1].name} | 4.8e-07 |" in text and f"| {STRATEGIES[2].name} | n/a |" in text
    assert ALONE.name not in text


@pytest.mark.slow
def test_a_whole_run_of_two_ranks_equals_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "strategies.json"
    main(["--model", "LLaDA", "--only", "ddp x2", "--steps", "2", "--to", str(out)], standalone_mode=False)
    run = json.loads(out.read_text(encoding="utf-8"))["runs"][0]
    assert set(run["runs"]) == {ALONE.name, "ddp x2"} and run["model"].startswith("LLaDA")
    assert len(run["runs"]["ddp x2"]["losses"]) == 2 and run["runs"]["ddp x2"]["difference"] < 1e-5
    assert "2 ranks hold equal weights" in run["runs"]["ddp x2"]["proof"]
    assert "| ddp x2 |" in capsys.readouterr().out
