"""`gptoughts bench gemm`: figures are whole, slow types of number stay small, and the cache gives back what was kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoughts.cli.main import main
from gptoughts.diagnostics.bench.gemm import Effort, bench_gemm, effort_for, gemm_markdown, gemm_text, measured_peaks_of
from gptoughts.errors import ConfigError
from gptoughts.hardware.machine import Machine, probe, read
from gptoughts.hardware.measured_peaks import (
    MeasuredPeaks,
    cache_file,
    datasheet,
    gemm_utilization,
    key,
    measured_peaks_for,
    save_measured_peaks,
)
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from tests.support.engines import plan_of, recipe_of

MACHINES = Path(__file__).parents[1] / "machines"
QUICK = Effort((32, 64), 0.5, 0.001, 3, 2**20)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def here() -> Machine:
    return replace(probe(), gpus=())


def test_figures_are_whole(here: Machine) -> None:
    run = json.loads(json.dumps(bench_gemm(here, "typed", effort=QUICK)))
    for dtype in ("fp32", "bf16", "fp16"):
        row = run["products"][dtype]
        assert (
            set(row["sizes"]) == {"32", "64"} and row["best_tflops"] == max(one["median"] for one in row["sizes"].values()) > 0
        )
    assert {dtype: run["products"][dtype]["why"] for dtype in ("tf32", "fp8")} == {
        "tf32": "needs a GPU of compute capability 8.0",
        "fp8": "needs a GPU of compute capability 8.9",
    }
    assert set(run["copies"]) == {"copy", "triad"} and run["copies"]["copy"]["gb_per_second"]["median"] > 0
    assert run["command"] == "typed" and run["machine"]["threads"] and run["device"] == key(here) and run["datasheet"] == {}
    for text in (gemm_text(run), gemm_markdown([run])):
        assert "64^3" in text and "triad" in text and "needs a GPU of compute capability 8.9" in text


def test_a_size_that_would_take_too_long_is_left_out(here: Machine) -> None:
    run = bench_gemm(here, "", effort=replace(QUICK, most_seconds=0.0))
    assert list(run["products"]["fp32"]["sizes"]) == ["32"] and run["products"]["fp32"]["why"].startswith("64 skipped")


def test_the_largest_size_can_be_named(here: Machine) -> None:
    assert effort_for(here, 1024).sizes == (256, 512, 1024) and effort_for(here, 64).sizes == (64,)
    assert max(effort_for(here).sizes) > 1024


def test_the_command_keeps_the_file_and_leaves_ceilings_to_whole_measurements(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptoughts.diagnostics.bench.gemm._full_effort", lambda device, machine: QUICK)
    out = tmp_path / "gemm.json"
    for words, kept in ((["--largest", "64", "--to", str(out)], False), ([], True)):
        with pytest.raises(SystemExit) as left:
            main(["bench", "gemm", *words])
        assert left.value.code == 0 and cache_file().exists() is kept
    said = capsys.readouterr().out
    assert "TFLOP/s" in said and str(cache_file()) in said and f"kept in {out}, {out.with_suffix('.md')}" in said
    assert json.loads(out.read_text(encoding="utf-8"))["runs"][0]["what"] == "bench gemm"
    found = measured_peaks_for(probe())
    assert found is not None and found.tflops["fp32"] > 0


def test_ceilings_come_back_for_this_device_power_and_torch_alone() -> None:
    h100 = read(MACHINES / "h100.json")
    found = MeasuredPeaks({"bf16": 700.0}, {"copy": 2900.0}, "2026-01-01T00:00:00Z")
    assert measured_peaks_for(h100) is None
    path = save_measured_peaks(h100, found)
    assert path == cache_file() and measured_peaks_for(h100) == found
    gpu = h100.gpus[0]
    assert measured_peaks_for(replace(h100, gpus=(replace(gpu, power_limit_watts=350.0),))) is None
    assert measured_peaks_for(replace(h100, packages={**h100.packages, "torch": "9.9"})) is None
    other = replace(h100, gpus=(replace(gpu, name="another"),))
    save_measured_peaks(other, MeasuredPeaks({}, {}, "later"))
    assert measured_peaks_for(h100) == found, "others stay"
    save_measured_peaks(h100, MeasuredPeaks({"bf16": 500.0, "fp8": 1200.0}, {"copy": 3000.0}, "2026-01-02T00:00:00Z"))
    assert measured_peaks_for(h100) == MeasuredPeaks(
        {"bf16": 700.0, "fp8": 1200.0}, {"copy": 3000.0}, "2026-01-02T00:00:00Z"
    ), "a busy hour"
    cache_file().unlink()
    save_measured_peaks(h100, found)
    assert found.share(350e12, "bf16") == pytest.approx(0.5) and found.share(1.0, "fp8") is None
    share, line = gemm_utilization(10**9, h100, World(0, 0, 2, 2), "bf16")
    assert share(7e5) == pytest.approx(0.5) and "700 TFLOP/s per GPU, bf16, measured on this machine, last 2026-01-01" in line
    for flops, dtype, here, why in (
        (None, "bf16", h100, "model size unknown"),
        (10**9, "fp16", h100, "gptoughts bench gemm could not measure it"),
        (10**9, "bf16", read(MACHINES / "t4.json"), "run gptoughts bench gemm"),
    ):
        share, line = gemm_utilization(flops, here, World(), dtype)
        assert share(1.0) is None and why in line
    assert datasheet(h100)["bf16"] == 989.4 and "copy" in datasheet(h100)


@given(st.one_of(st.binary(max_size=40), st.sampled_from([b"[]", b"{}", b'{"x": 1}'])))
def test_a_damaged_cache_is_none_and_is_written_anew(tmp_path_factory: pytest.TempPathFactory, damage: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        h100 = read(MACHINES / "h100.json")
        cache_file().parent.mkdir(parents=True)
        cache_file().write_bytes(damage)
        assert measured_peaks_for(h100) is None
        found = MeasuredPeaks({"bf16": 1.0}, {}, "now", 2)
        save_measured_peaks(h100, found)
        assert measured_peaks_for(h100) == found


def test_a_row_of_another_shape_is_none() -> None:
    h100 = read(MACHINES / "h100.json")
    cache_file().parent.mkdir(parents=True)
    for row in (
        3,
        {},
        {"tflops": {"bf16": "many"}, "gb_per_second": {}, "measured": ""},
        {"tflops": 1, "gb_per_second": {}, "measured": ""},
    ):
        cache_file().write_text(json.dumps({key(h100): row}), encoding="utf-8")
        assert measured_peaks_for(h100) is None


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME"):
        save_measured_peaks(read(MACHINES / "h100.json"), MeasuredPeaks({}, {}, ""))


def test_the_ceiling_of_a_plan_is_that_of_its_products(here: Machine) -> None:
    def with_layers(**named: str) -> str:
        plan = plan_of(recipe_of("modern"))
        changed = (
            replace(plan.choice(slot), layer=layer, options={"units": "bf16"}, compute_dtype=CATALOG[layer].compute_dtype)
            for slot, layer in named.items()
        )
        kept = tuple(choice for choice in plan.choices if choice.slot not in named)
        order = {choice.slot: place for place, choice in enumerate(plan.choices)}
        return replace(plan, choices=tuple(sorted((*kept, *changed), key=lambda choice: order[choice.slot]))).gemm_dtype

    assert with_layers(precision="fp32", matmul="ieee") == "fp32"
    assert with_layers(precision="fp32", matmul="tf32") == "bf16", "oneDNN's units, as named"
    assert with_layers(precision="fp16", matmul="tf32") == "fp16"
    assert with_layers(precision="fp8-te") == with_layers(precision="bf16") == "bf16"
    assert measured_peaks_of(bench_gemm(here, "", effort=QUICK)).threads
