"""`gptoughts bench layers`: variants differ in one slot, run in processes of their own, and what was not seen is not counted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoughts.api import decide
from gptoughts.cli.main import main
from gptoughts.console import bytes_in_words
from gptoughts.diagnostics.bench.children import (
    NoRoom,
    Result,
    Turns,
    _add_losses,
    _refuse_crowding,
    _roomy,
    measure,
    order,
)
from gptoughts.diagnostics.bench.curves import first_below, mean_difference, smoothed, window_of
from gptoughts.diagnostics.bench.figures import spread
from gptoughts.diagnostics.bench.gains import gains
from gptoughts.diagnostics.bench.layers import BASELINE, PLAN, bench_layers, variants_of
from gptoughts.diagnostics.bench.layers_table import layers_markdown, layers_text
from gptoughts.diagnostics.bench.text import aligned
from gptoughts.diagnostics.bench.training import open_training
from gptoughts.diagnostics.bench.variant import OUT_OF_MEMORY, Job
from gptoughts.diagnostics.bench.variant_process import Variant, VariantFailed, environment_of
from gptoughts.diagnostics.bench.variants import job_of, plan_of
from gptoughts.errors import ConfigError, DataError, LayerError
from gptoughts.planning.environment import GUARD
from tests.support.bench_settings import PLAIN, PLUGIN, asked, fields_in, flags_of
from tests.support.engines import config_folder
from tests.support.tiers import slow_except


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, str]:
    return fields_in(tmp_path)


def job(fields: dict[str, str], *plugins: str, **layers: str) -> Job:
    setting, ask = asked(fields, *plugins, **layers)
    return job_of(setting, ask, setting.plan)


# --- variants


def test_variants_differ_in_one_slot_and_twins_are_measured_once(fields: dict[str, str]) -> None:
    found = variants_of(*asked(fields, attention="sdpa", optimizer="fused", precision="bf16"))
    assert found.parts == {"attention": "sdpa", "precision": "bf16", "optimizer": "fused"}
    assert len(found.plans) == 8 and not found.left_out and not found.same_as
    layers = {name: plan.layers for name, plan in found.plans.items()}
    for slot, layer in found.parts.items():
        assert {key for key in layers[PLAN] if layers[PLAN][key] != layers[f"plan without {layer}"][key]} == {slot}
        assert {key for key in layers[BASELINE] if layers[BASELINE][key] != layers[f"baseline with {layer}"][key]} == {slot}
    two = variants_of(*asked(fields, attention="sdpa", optimizer="fused"))
    assert two.same_as == {"plan without fused": "baseline with sdpa", "baseline with fused": "plan without sdpa"}
    assert variants_of(*asked(fields, attention="sdpa")).same_as == {"plan without sdpa": BASELINE, "baseline with sdpa": PLAN}


def test_what_cannot_go_without_another_is_told(fields: dict[str, str]) -> None:
    found = variants_of(*asked(fields, PLUGIN, attention="sdpa", kernels="leaning"))
    assert set(found.left_out) == {"plan without sdpa", "baseline with leaning"}
    assert all("leaning needs attention = sdpa" in why for why in found.left_out.values())


def test_options_travel_with_their_layer(fields: dict[str, str]) -> None:
    setting, ask = asked(fields, microbatch="fixed", **{"microbatch.sequences": "2"})
    found = variants_of(setting, ask)
    assert found.plans[PLAN].choice("microbatch").options["sequences"] == 2
    assert job_of(setting, ask, found.plans[PLAN]).layers["microbatch.sequences"] == 2


def test_nothing_to_take_away(fields: dict[str, str]) -> None:
    with pytest.raises(LayerError, match="bench layers: every slot of this plan has its baseline"):
        bench_layers(*asked(fields), 1, 1, "")


def test_ranks_are_sent_away(fields: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    setting, ask = asked(fields, parallel="ddp")
    with pytest.raises(ConfigError, match="not under torchrun"):
        job_of(setting, ask, setting.plan)


def test_variables_of_another_plan_do_not_reach_a_variant(fields: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GUARD, f"{os.getpid()}:OMP_NUM_THREADS,EARLIER")
    monkeypatch.setenv("EARLIER", "plan")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    setting, ask = asked(fields)
    without = environment_of(job_of(setting, ask, setting.plan))
    assert GUARD not in without and "EARLIER" not in without and "OMP_NUM_THREADS" not in without
    setting, ask = asked(fields, host="system")
    plan = plan_of(setting, ask, {**PLAIN, "host": "threads", "host.threads": 1})
    assert environment_of(job_of(setting, ask, plan))["OMP_NUM_THREADS"] == "1"


# --- what a process does, in this one


@pytest.mark.parametrize("kind", slow_except(["gpt", "llada", "llama", "deepseek_v3"], "gpt", "llada"))
def test_every_kind_of_model_trains_and_is_watched(kind: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400, encoding="utf-8")
    sizes = {"depth": 1, "width": 32, "heads": 2}
    models = {"gpt": sizes, "llada": {"family": "llada", **sizes}}
    values = {
        "name": "tiny",
        "objective": "masked-diffusion" if kind == "llada" else "next-token",
        "model": models.get(kind) or {"config": config_folder(kind), "vocab_size": 320},
        "data": {"path": str(text), "cache": str(tmp_path / "cache"), "tokenizer": "bytes", "sequence_length": 16},
        "train": {"steps": 20, "global_batch": 4},
    }
    with open_training(decide(values, layers=PLAIN)) as training:
        assert training.steps(2) > 0
        seen = training.watched()
        training.steps(1)
        losses = training.losses.taken()
    assert {str(line.evidence.status) for line in seen} == {"active"}
    assert len(losses) == 4 and all(0 < loss < 20 for loss in losses)
    assert training.figures()["tokens_per_step"] == 64 and training.figures()["flops_per_token"] > 0


def test_first_weights_of_another_seed_and_the_same_data(fields: dict[str, str]) -> None:
    losses = []
    for seed in (None, 1, None):
        with open_training(asked(fields)[0], seed) as training:
            training.steps(2)
            losses.append(training.losses.taken())
    assert losses[0] == losses[2] != losses[1]


def test_a_recipe_by_the_clock_is_refused(fields: dict[str, str]) -> None:
    setting, _ = asked({**fields, "train.hours": "1", "train.steps": "none"})
    with pytest.raises(ConfigError, match="so that variants could not be compared"), open_training(setting):
        pass


# --- processes


@pytest.mark.slow
def test_an_ablation_from_the_command_line(fields: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [word for key, value in fields.items() for word in (f"--{key}", value)]
    slots = {**PLAIN, "attention": "sdpa"}
    flags += [word for slot, layer in slots.items() for word in (f"--layer.{slot}", layer)]
    out = tmp_path / "layers.json"
    with pytest.raises(SystemExit) as left:
        main(["bench", "layers", "quickstart", *flags, "--rounds", "2", "--steps", "2", "--to", str(out)])
    assert left.value.code == 0
    said = capsys.readouterr()
    run = json.loads(out.read_text(encoding="utf-8"))["runs"][0]
    assert set(run["variants"]) == {"baseline", "plan"}
    assert run["same_as"] == {"plan without sdpa": "baseline", "baseline with sdpa": "plan"}
    for name, row in run["variants"].items():
        times = row["step_ms"]
        assert 0 < times["min"] <= times["q1"] <= times["median"] <= times["q3"] <= times["max"], name
        assert row["tokens_per_second"] == pytest.approx(64 / times["median"] * 1000, rel=1e-3)
        assert row["loss_difference"] < 0.01 and row["loss_steps"] == 2 + 1 + 4
        assert row["mfu"] is None and row["start_seconds"] > row["first_step_seconds"] > 0
        assert row["peak_bytes"] is None or row["peak_bytes"] > 0
    assert run["variants"]["plan"]["evidence"]["attention"].startswith("active: 1 flash")
    assert run["variants"]["baseline"]["evidence"] == {}
    assert set(run["gains"]) == {"attention"} and run["gains"]["attention"]["alone"]["median"] > 0
    assert run["mfu_formula"].startswith("MFU n/a") and run["command"] and len(run["load_averages"]) == 3
    for word in ("plan without sdpa", "plan / baseline, measured", "MFU n/a", "loss diff."):
        assert word in said.out
    assert "round 2 of 2" in said.err
    table = out.with_suffix(".md").read_text(encoding="utf-8")
    assert "| baseline |" in table and "baseline with sdpa: same as plan" in table and "(layers.png)" in table
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_an_inactive_layer_is_marked_and_not_counted(fields: dict[str, str], tmp_path: Path) -> None:
    run = json.loads(json.dumps(bench_layers(*asked(fields, PLUGIN, matmul="idle"), 1, 1, "typed")))
    assert run["variants"]["plan"]["failure"] == "inactive: matmul=idle: does nothing"
    assert "step_ms" in run["variants"]["baseline"] and "step_ms" not in run["variants"]["plan"]
    assert run["whole"]["measured"] is None and run["gains"]["matmul"]["alone"] is None
    for text in (layers_text(run), layers_markdown([run], "x.png")):
        assert "not counted" in text and "idle: does nothing" in text and "plan / baseline: n/a" in text


@pytest.mark.slow
def test_each_round_can_start_anew(fields: dict[str, str]) -> None:
    told, how = measure({"one": job(fields)}, 2, 1, lambda text: None, turns=Turns.APART)
    assert how is Turns.APART and len(told["one"].seconds) == 2
    assert len(told["one"].losses) == 4, "of the last start: two warm steps, the watched one, and one that counts"


def test_a_users_mistake_is_told_as_one(fields: dict[str, str]) -> None:
    with pytest.raises(DataError, match="nowhere"):
        measure({"one": job({**fields, "data.path": "/nowhere/text.txt"})}, 1, 1, lambda text: None)


def test_a_killed_process_ran_out_of_memory_and_others_go_on(fields: dict[str, str]) -> None:
    child = Variant(job(fields))
    assert child.request(child.job.to_json())["evidence"]
    os.kill(child.process.pid, signal.SIGKILL)
    with pytest.raises(VariantFailed) as failed:
        child.request({"steps": 1})
    assert failed.value.kind == OUT_OF_MEMORY
    child.close()


def test_a_process_that_dies_leaves_its_last_words() -> None:
    child = Variant(Job("quickstart", "auto", {}, {}, ""))
    with pytest.raises(VariantFailed) as failed:
        child.request({"not": "a job"})
    assert "exit code 1" in str(failed.value) and "TypeError" in str(failed.value)
    child.close()


def test_a_plan_that_changed_is_noticed(fields: dict[str, str]) -> None:
    setting, ask = asked(fields)
    made = job_of(setting, ask, setting.plan)
    child = Variant(Job(**{**made.to_json(), "digest": "another"}))
    with pytest.raises(VariantFailed, match="bench: the plan changed between parent and child"):
        child.request(child.job.to_json())
    child.close()


@pytest.mark.slow
def test_ctrl_c_ends_the_processes(fields: dict[str, str]) -> None:
    flags = flags_of(fields, attention="sdpa")
    # A job in a shell's background ignores the signal and hands that on.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from gptoughts.cli.main import main; main()"
    )
    words = [sys.executable, "-c", program, "bench", "layers", "quickstart", *flags, "--rounds", "2", "--steps", "2000"]
    bench = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True)
    try:
        assert bench.stderr is not None
        for line in bench.stderr:
            if line.startswith("starting 2"):  # one waits for its turn, one is on its way
                break
        listed, children = Path("/proc", str(bench.pid), "task", str(bench.pid), "children"), [""]
        while len(children) < 2 and bench.poll() is None:
            time.sleep(0.02)
            children = listed.read_text().split()
        bench.send_signal(signal.SIGINT)
        _, said = bench.communicate(timeout=60)
        assert bench.returncode == 130 and "interrupted" in said and "Traceback" not in said
    finally:
        bench.kill()
        bench.wait()
    deadline = time.monotonic() + 10
    while any(Path("/proc", pid).exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in children if Path("/proc", pid).exists()]


def test_room_is_asked_for_before_the_next_process() -> None:
    def told(held: int | None, free: int | None) -> Result:
        return Result(ready={"held_bytes": held, "free_bytes": free})

    assert _roomy([Result()]) and _roomy([told(None, None)]) and _roomy([told(100, None)])
    assert _roomy([told(100, 1000), told(100, 210)])
    assert not _roomy([told(100, 1000), told(60, 190)]), "the next may need what the largest needed"


# --- arithmetic


@given(st.lists(st.text(min_size=1), min_size=1, max_size=9, unique=True), st.integers(0, 30))
def test_every_round_holds_every_variant_once(names: list[str], number: int) -> None:
    assert sorted(order(names, number)) == sorted(names)
    assert len(names) < 3 or order(names, number) != order(names, number + 1)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.5, 2), min_size=2, max_size=5), st.floats(0.01, 10))
def test_independent_layers_add_up(factors: list[float], base: float) -> None:
    """Where each layer multiplies the speed by its own factor whatever else is there, the parts are the whole."""
    layers = {f"slot{place}": f"layer{place}" for place in range(len(factors))}
    whole = base
    for factor in factors:
        whole /= factor
    seconds: dict[str, list[float]] = {"baseline": [base, base], "plan": [whole, whole]}
    for layer, factor in zip(layers.values(), factors, strict=True):
        seconds |= {f"baseline with {layer}": [base / factor] * 2, f"plan without {layer}": [whole * factor] * 2}
    found = gains(layers, seconds)
    assert found["whole"]["products"]["alone"]["product"]["value"] == pytest.approx(base / whole, rel=1e-3, abs=1e-4)
    assert found["whole"]["products"]["in_plan"]["product"]["value"] == pytest.approx(base / whole, rel=1e-3, abs=1e-4)
    assert all(row["interaction"]["value"] == pytest.approx(1, abs=1e-3) for row in found["gains"].values())


def test_overlap_and_help_are_told_apart() -> None:
    parts = {"a": "x", "b": "y"}
    overlap = {"baseline": [4.0, 4.0], "plan": [1.9, 1.9]} | {
        f"{end} {one}": [2.0, 2.0] for one in "xy" for end in ("baseline with", "plan without")
    }
    said = " ".join(gains(parts, overlap)["whole"]["words"])
    assert said.count("layers overlap") == 2 and "x gains less in the plan than alone" in said
    helping = {"baseline": [4.0, 4.0], "plan": [1.0, 1.0]} | {
        f"{end} {one}": [3.5, 3.5] for one in "xy" for end in ("baseline with", "plan without")
    }
    said = " ".join(gains(parts, helping)["whole"]["words"])
    assert said.count("layers help each other") == 2 and "x gains more in the plan than alone" in said


def test_a_training_that_came_to_nothing_is_not_counted() -> None:
    told = Result(seconds=[1.0])
    _add_losses(told, [2.0, 1.5])
    assert told.counted
    _add_losses(told, [float("nan"), 1.0])
    assert told.failure == "loss not finite from step 3 on" and told.diverged and not told.counted


def test_a_variant_that_runs_out_of_memory_beside_others_is_tried_alone() -> None:
    short = Result(failure=f"{OUT_OF_MEMORY}: no")
    with pytest.raises(NoRoom, match="plan ran out of memory beside 2 others"):
        _refuse_crowding("plan", short, 3, False)
    for alive, forced in ((1, False), (3, True)):
        _refuse_crowding("plan", short, alive, forced)
    _refuse_crowding("plan", Result(failure="inactive: x"), 3, False)


def test_a_part_that_was_not_measured_is_named() -> None:
    found = gains({"a": "x", "b": "y"}, {"baseline": [2.0], "plan": [1.0], "baseline with x": [1.5], "plan without x": [1.5]})
    assert found["whole"]["products"]["alone"]["without"] == ["y"] and found["gains"]["b"]["alone"] is None
    assert "without y (not measured)" in " ".join(found["whole"]["words"])


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60), st.integers(1, 12))
def test_smoothing_stays_inside_its_window(losses: list[float], window: int) -> None:
    curve = smoothed(losses, window)
    for place, value in enumerate(curve):
        seen = losses[max(0, place - window + 1) : place + 1]
        assert min(seen) - 1e-9 <= value <= max(seen) + 1e-9
    assert smoothed(losses, 1) == pytest.approx(losses)
    assert smoothed([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_differences_of_curves() -> None:
    assert mean_difference([2.0] * 20, [2.0] * 30) == 0
    assert mean_difference([2.02] * 20, [2.0] * 20) == pytest.approx(0.01)
    assert mean_difference([2.0, float("nan")], [2.0, 2.0]) is None and mean_difference([], [1.0]) is None
    assert first_below([3.0, 2.0, 2.5, 1.0], 2.0) == 2 and first_below([3.0], 2.0) is None
    assert window_of(5) == 1 and window_of(200) == 20


def test_words_and_columns() -> None:
    assert spread([2.0])["q1"] == spread([2.0])["q3"] == 2.0
    assert aligned([("a", "bb"), ("ccc", "d")]) == ["a    bb", "ccc   d"]
    assert bytes_in_words(None) == "n/a" and bytes_in_words(3 * 2**20) == "3 MiB" and bytes_in_words(3 * 2**29) == "1.50 GiB"


def test_where_figures_go_is_looked_at_before_anything_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.json").write_text('{"runs": "mine"}', encoding="utf-8")
    (tmp_path / "file").touch()
    for name, why in (
        ("notes.json", "not a file of measurements"), ("notes.md", "must end in .json"), ("file/new.json", "cannot be written"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as left:
            main(["bench", "gemm", "--to", str(tmp_path / name)])
        assert left.value.code == 2 and why in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    from gptoughts.diagnostics.bench.figures import keep

    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be written"):
        keep(tmp_path / "file" / "below.json", {"what": "x"}, ("what",))
