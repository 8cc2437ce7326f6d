"""`gptoughts bench parity`: what is compared with what, the gate's arithmetic, and a plan that climbs does not pass it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoughts.cli.main import main
from gptoughts.diagnostics.bench.children import Result, Turns
from gptoughts.diagnostics.bench.parity import LEAST_LIMIT, _demand, bench_parity, in_question, reference_of, verdict
from gptoughts.diagnostics.bench.parity_table import parity_markdown, parity_text
from gptoughts.diagnostics.bench.picture import draw_parity
from gptoughts.errors import ConfigError, LayerError
from gptoughts.layers import CATALOG
from tests.support.bench_settings import PLUGIN, asked, fields_in, flags_of


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, str]:
    return fields_in(tmp_path)


def test_low_precision_is_compared_with_bf16_and_bf16_with_fp32(fields: dict[str, str]) -> None:
    setting, ask = asked(fields, precision="bf16", attention="sdpa")
    assert in_question(setting) == {"attention": "sdpa"}, (
        "bf16 is the reference; without low precision every other change is asked"
    )
    assert in_question(setting, ["precision"]) == {"precision": "bf16"}
    reference = reference_of(setting, ask, {"precision": "bf16"})
    assert reference.layers == {**setting.plan.layers, "precision": "fp32"}
    assert reference_of(setting, ask, {"attention": "sdpa"}).layers == {**setting.plan.layers, "attention": "math"}


@pytest.mark.skipif("fp16" not in CATALOG, reason="no fp16 layer here")
def test_fp16_is_compared_with_bf16_beside_the_same_attention(fields: dict[str, str]) -> None:
    setting, ask = asked(fields, precision="fp16", attention="sdpa")
    assert in_question(setting) == {"precision": "fp16"}
    assert reference_of(setting, ask, {"precision": "fp16"}).layers == {**setting.plan.layers, "precision": "bf16"}


def test_what_cannot_be_asked(fields: dict[str, str]) -> None:
    setting, _ = asked(fields)
    with pytest.raises(ConfigError, match="no layer of this plan changes numerics"):
        in_question(setting)
    with pytest.raises(ConfigError, match="no layer of this plan changes numerics"):
        in_question(setting, ["precision"])
    with pytest.raises(ConfigError, match="did you mean 'precision'"):
        in_question(setting, ["precison"])


@given(st.floats(-0.2, 0.2), st.floats(0, 0.05), st.integers(10, 80))
def test_the_gate(shift: float, noise: float, steps: int) -> None:
    """Seeds that lie `noise` apart on either side: their standard deviation is known."""
    curves = {
        "plan": [2.0 * (1 + shift)] * steps,
        "reference": [2.0] * steps,
        "seed 1": [2.0 * (1 + noise)] * steps,
        "seed 2": [2.0 * (1 - noise)] * steps,
    }
    found = verdict(curves)
    assert found["seed_noise"] == pytest.approx(noise, abs=1e-9)
    assert found["limit"] == pytest.approx(max(LEAST_LIMIT, 2 * noise), abs=1e-9)
    assert found["difference"] == pytest.approx(shift, abs=1e-9)
    if abs(abs(shift) - found["limit"]) > 1e-6:
        assert found["passed"] == (abs(shift) < found["limit"])


def test_without_other_seeds_half_a_per_cent_stands() -> None:
    found = verdict({"plan": [2.009] * 20, "reference": [2.0] * 20})
    assert found["seed_noise"] is None and found["limit"] == LEAST_LIMIT and found["passed"]
    assert not verdict({"plan": [2.011] * 20, "reference": [2.0] * 20})["passed"]


def test_a_loss_that_is_not_finite_does_not_pass() -> None:
    found = verdict({"plan": [2.0] * 19 + [float("nan")], "reference": [2.0] * 20})
    assert not found["passed"] and found["difference"] is None and found["mean_difference"] is None


@pytest.mark.slow
def test_the_same_training_passes_and_is_drawn(fields: dict[str, str], tmp_path: Path) -> None:
    """Torch's own attention, in processes of their own, one of them from other first weights."""
    run = bench_parity(*asked(fields, attention="sdpa"), steps=9, seeds=1, named=[], command="typed", turns=Turns.IN_A_ROW)
    run = json.loads(json.dumps(run))
    assert run["passed"] and abs(run["difference"]) < 1e-3 and run["seed_noise"] > 0
    assert run["in_question"] == {"attention": "sdpa"} and run["reference"] == {"attention": "math"}
    assert set(run["losses"]) == {"plan", "reference", "reference, weights of seed 1338"} and run["steps"] == 9
    assert len({len(curve) for curve in run["losses"].values()}) == 1
    assert run["evidence"]["attention"].startswith("1 flash")
    assert set(run["to_equal_loss"]) == {"plan", "reference"}
    for row in run["to_equal_loss"].values():
        assert row["tokens"] == 64 * row["steps"] and row["seconds"] == pytest.approx(
            row["steps"] * row["step_seconds"], rel=1e-2
        )
    for text in (parity_text(run), parity_markdown([run], "x.png")):
        assert "passed" in text and "NOT" not in text and "seed noise" in text and "attention sdpa against math" in text
    draw_parity(run, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def failed_verdict(fields: dict[str, str], out: Path, layer: str) -> None:
    """`bench parity` of a plan with this layer, which must leave with 1."""
    flags = flags_of(fields, matmul=layer)
    words = ["bench", "parity", "quickstart", "--plugin", PLUGIN, *flags, "--steps", "12", "--seeds", "0", "--to", str(out)]
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 1


def test_a_plan_that_climbs_leaves_with_1(fields: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "parity.json"
    failed_verdict(fields, out, "uphill")
    said = capsys.readouterr().out
    assert "NOT passed" in said and "matmul uphill against ieee" in said
    run = json.loads(out.read_text(encoding="utf-8"))["runs"][0]
    assert run["difference"] > run["limit"] == LEAST_LIMIT
    assert out.with_suffix(".png").exists() and "NOT passed" in out.with_suffix(".md").read_text(encoding="utf-8")


def test_a_plan_that_comes_to_nothing_leaves_with_1(
    fields: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "parity.json"
    failed_verdict(fields, out, "nowhere")
    said = capsys.readouterr().out
    assert "NOT passed" in said and "smoothed loss, plan - reference: not finite" in said
    (run,) = json.loads(out.read_text(encoding="utf-8"), parse_constant=pytest.fail)["runs"]
    assert run["difference"] is run["final_losses"]["plan"] is None and run["final_losses"]["reference"] > 0
    assert out.with_suffix(".png").exists()


def test_a_layer_that_is_not_active_has_no_parity() -> None:
    with pytest.raises(LayerError, match="plan: inactive: matmul=idle"):
        _demand({"plan": Result(failure="inactive: matmul=idle"), "reference": Result(seconds=[1.0])})
    _demand({"reference": Result(seconds=[1.0])})
