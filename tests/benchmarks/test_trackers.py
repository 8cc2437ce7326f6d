"""`python -m benchmarks.trackers`: all trackers run beside the same training without them, and the figures are complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.trackers import AGAIN, OFF, ON, main
from tests.support.bench_settings import fields_in, flags_of


@pytest.mark.slow
def test_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    out = tmp_path / "trackers.json"
    main(["quickstart", *flags_of(fields_in(tmp_path)), "--rounds", "2", "--steps", "3", "--to", str(out)])
    run = json.loads(out.read_text(encoding="utf-8"))["runs"][0]
    assert set(run["variants"]) == {OFF, ON, AGAIN} and set(run["ratios_of_seconds"]) == {f"{ON} / {OFF}", f"{AGAIN} / {OFF}"}
    assert {"tracker-TensorBoard", "tracker-Wandb", "child processes"} <= set(run["background_cpu_ms_per_step"])
    assert run["sample_ms"] > 0 and len(run["load_averages"]) == 3
    assert "CPU of threads of the trackers" in capsys.readouterr().out
