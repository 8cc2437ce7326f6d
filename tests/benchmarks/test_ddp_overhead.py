"""`python -m benchmarks.ddp_overhead`: both loops train alike on two ranks, and the figures are complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.ddp_overhead import BARE, NAMES, main, overhead_table
from benchmarks.step import AGAIN, OURS
from tests.support.bench_settings import fields_in, flags_of


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ranks", "1"], "1 is not in the range x>=2"),
        (["--train.global-batch", "3"], "train.global_batch = 3 is not divisible by 2 ranks"),
        (["--to", "/proc/none/x.json"], "cannot be written"),
    ],
)
def test_bad_input(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["quickstart", *flags_of(fields_in(tmp_path)), *words])
    assert left.value.code == 2 and said in capsys.readouterr().err


def test_table() -> None:
    spread = {"median": 1.005, "q1": 1.0, "q3": 1.01, "min": 0.9, "max": 1.1}
    run = {
        "recipe": "r", "model": {"parameters": 10_000_000}, "global_batch": 16, "ranks": 2, "threads_per_rank": 1, "rounds": 5,
        "machine": {"label": "CPU", "torch": "2.13.0"}, "load_averages": [1.0, 2.0], "overhead": 0.0052,
        "variants": {name: {"step_ms": spread} for name in NAMES},
        "ratios_of_seconds": {f"{OURS} / {BARE}": spread, f"{AGAIN} / {OURS}": spread},
    }  # fmt: skip
    text = overhead_table(run)
    assert (
        "overhead of ours (both): +0.52 %" in text and "ours / bare DDP            1.005" in text and "10 M parameters" in text
    )


@pytest.mark.slow
def test_two_ranks_train_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "overhead.json"
    fields = {**fields_in(tmp_path), "log.every": "1"}
    main(["quickstart", *flags_of(fields), "--rounds", "2", "--steps", "2", "--to", str(out)])
    run = json.loads(out.read_text(encoding="utf-8"))["runs"][0]
    assert set(run["variants"]) == set(NAMES) and run["ranks"] == 2 and run["plan"]["parallel"] == "ddp"
    assert all(row["step_ms"]["min"] > 0 for row in run["variants"].values())
    losses = run["last_logged_losses"]  # of each rank: the bare loop has its own share, ours the global loss
    assert losses[OURS] == losses[AGAIN] and sum(losses[BARE]) / 2 == pytest.approx(losses[OURS][0], abs=2e-4)
    assert "2 ranks hold equal weights" in run["evidence"]["parallel"]
    assert "overhead of ours" in capsys.readouterr().out
