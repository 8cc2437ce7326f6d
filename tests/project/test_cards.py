"""Cards: docs/layers.md and profiles/README.md are what the generators print, and a card says everything that the record holds."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from click import Context

from benchmarks.profile_cards import PAGE, first_sentence, page
from benchmarks.profile_figures import read_figures
from gptoughts.cli.cards import card, layers_page
from gptoughts.cli.main import build_cli, main
from gptoughts.layers import CATALOG
from gptoughts.planning.layer import SLOTS, Layer, Option, active
from gptoughts.planning.profile import names
from gptoughts.planning.profile import read as read_profile
from tests.support.golden_files import ROOT, compare


def test_docs_page_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["layers", "--markdown"])
    printed = capsys.readouterr().out
    assert left.value.code == 0 and printed == layers_page(CATALOG)
    compare(ROOT / "docs" / "layers.md", printed)


def test_every_layer_is_on_the_page() -> None:
    page = layers_page(CATALOG)
    for name, layer in CATALOG.items():
        assert (f"**{name}** (baseline)" if layer.baseline else f"### {name}\n") in page


def test_a_card_says_all() -> None:
    layer = Layer(
        name="mine",
        slot="optimizer_offload",
        card="Does it.",
        apply=lambda *_: nullcontext(),
        verify=lambda *_: active(""),
        packages=(("a-package", "fp8"),),
        min_capability=(9, 0),
        options={"some_size": Option(None, "its my_size", int), "kind": Option("a", "a kind", choices=("a", "b"))},
        wraps=("backward",),
        replaces=("step",),
        clashes={"other": "both do it"},
        needs_slots={"compile": ("eager", "x")},
        changes_numerics=True,
        repeatable=False,
        permanent="it is written in stone",
        measured="docs/measurements/x.json",
    )
    text = card(layer)
    for words in (
        "optimizer_offload = mine",
        "- needs: compute capability 9.0, a-package (pip install 'gptoughts[fp8]'), compile = eager or x",
        "- applied: real",
        "- step hooks: wraps backward, replaces step",
        "- incompatible with other: both do it",
        "- changes numerics: yes; bit-identical when repeated: no",
        "- undo: it is written in stone",
        "- option `--layer.optimizer-offload.some-size`: its my_size (default none)",
        "- option `--layer.optimizer-offload.kind`: a kind (default a, one of a, b)",
        "- measured: docs/measurements/x.json",
    ):
        assert words in text


# Cards of profiles.


def test_the_page_of_profiles_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    compare(PAGE, page())


def test_every_profile_slot_and_layer_is_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cards = {text.partition("\n")[0]: text for text in page().split("\n## ")[1:]}
    assert list(cards) == names()
    for name, text in cards.items():
        profile = read_profile(name)
        for slot, wants in profile.slots.items():
            row = next(line for line in text.splitlines() if line.startswith(f"| {slot} | `"))
            assert all(f"`{want.layer}`" in row for want in wants)
            assert first_sentence(CATALOG[wants[0].layer].card) in row
        for slot in set(SLOTS) - set(profile.slots):
            assert f"{slot} (" in text
        assert "No machine file" not in text, "every profile has a machine file"


def test_reasons_of_the_plan_are_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    hopper = page().split("\n## hopper\n")[1].split("\n## ")[0]
    assert "tests/machines/h100.json" in hopper
    row = next(line for line in hopper.splitlines() if line.startswith("| precision | `fp8-te`") and "width 768" in line)
    assert "| gpt2-124m |" in row and "nanochat" in row
    by_name = page().split("\n## h100-fp8\n")[1].split("\n## ")[0]
    assert "never; by name" in by_name and "expected slowdown" in by_name


def test_a_profile_without_a_machine_says_so() -> None:
    assert "No machine file matches this profile" in page(machines={})


GAIN = {"median": 1.234, "q1": 1.2, "q3": 1.3}


def test_figures_come_from_the_files(tmp_path: Path) -> None:
    known = [read_profile(name) for name in names()]
    folder = tmp_path / "docs" / "measurements" / "h100"
    folder.mkdir(parents=True)
    label = "1 x NVIDIA H100 80GB HBM3 (sm 9.0)"
    step = {
        "what": "bench step", "recipe": "r", "machine": {"label": label}, "profile": "hopper",
        "variants": {"ours": {"tokens_per_second": 1000.0, "mfu": 0.5}}, "ratios_of_tokens_per_second": {"ours / plain": GAIN},
    }  # fmt: skip
    gains = {
        "compile": {"layer": "compile-blocks", "alone": GAIN, "in_plan": None},
        "loss": {"layer": "fused-ce", "alone": None, "in_plan": None},
    }
    layers = {
        "what": "bench layers",
        "recipe": "r",
        "machine": {"label": label},
        "profile": "hopper",
        "gains": gains,
        "whole": {"measured": GAIN},
    }
    (folder / "bench.json").write_text(json.dumps({"runs": [step, layers]}))
    stage = {"plan": {}, "tokens_per_second": 2000.0, "mfu": None, "peak_memory_bytes": 2 << 30}
    (folder / "stage.json").write_text(json.dumps({"machine": label, "runs": {"a-run": stage, "failed": {"plan": {}}}}))
    (folder / "list.json").write_text("[1, 2]")
    found = read_figures(tmp_path, known)
    assert [(one.profile, one.slot, one.text) for one in found] == [
        ("hopper", "", "r: 1,000 tokens/s, MFU 50.0%, 1.23x a bare loop with the same settings"),
        ("hopper", "", "r: 1.23x the baseline, plain PyTorch in every slot"),
        ("hopper", "compile", "1.23x alone, r"),
        ("hopper", "", "a-run: 2,000 tokens/s, MFU n/a, peak 2.00 GiB"),
    ]
    text = page(figures=found).split("\n## hopper\n")[1].split("\n## ")[0]
    assert "`compile-blocks` 1.23x alone, r ([h100/bench.json](../docs/measurements/h100/bench.json))" in text
    assert f"- a-run: 2,000 tokens/s, MFU n/a, peak 2.00 GiB; {label}" in text
    assert page(figures=[]).count("Measured as a whole: not measured.") == len(known)


def test_links_of_the_page_lead_somewhere() -> None:
    folder = ROOT / "profiles"
    for target in re.findall(r"\]\(([^)#\s]+)\)", (folder / "README.md").read_text(encoding="utf-8")):
        assert (folder / target).resolve().exists(), target


# The guide.

GUIDE = (ROOT / "docs" / "gpu-guide.md").read_text(encoding="utf-8")


def test_every_flag_and_layer_of_the_guide_exists() -> None:
    train = build_cli().commands["train"]
    known = {name for parameter in train.get_params(Context(train)) for name in parameter.opts if name.startswith("--")}
    trace = build_cli().commands["trace"]
    known |= {name for parameter in trace.get_params(Context(trace)) for name in parameter.opts if name.startswith("--")}
    known |= {"--cpunodebind", "--membind", "--quick", "--to", "--machine"}
    assert sorted(set(re.findall(r"(--[a-z][a-z.-]+)", GUIDE)) - known) == []
    there = {(layer.slot.replace("_", "-"), name) for name, layer in CATALOG.items()}
    demanded = re.findall(r"--layer\.([a-z-]+) ([\w-]+)", GUIDE)
    assert demanded and [pair for pair in demanded if pair not in there] == []


def test_our_gains_in_the_guide_are_those_of_the_files() -> None:
    folder = ROOT / "docs" / "measurements" / "cpu"
    runs = json.loads((folder / "widths.json").read_text())["runs"]
    half, full = [run["bf16_compiled"] / run["bf16_eager"] for run in runs], [run["float32_compiled"] for run in runs]
    assert GUIDE.count(f"{min(full):.2f}x to {max(full):.2f}x in float32") == 2
    assert GUIDE.count(f"{min(half):.2f}x to {max(half):.2f}x in bf16") == 2
    modern = {run["width"]: run["bf16_eager"] for run in runs if run["form"] == "modern"}
    assert f"{modern[256]:.2f}x at width 256, {modern[384]:.2f}x at 384, {modern[128]:.2f}x at 128" in GUIDE
    (step,) = [run for run in json.loads((folder / "step.json").read_text())["runs"] if run["recipe"] == "bench-10m"]
    assert f"{step['ratios_of_tokens_per_second']['ours / fp32 eager']['median']:.2f}x float32 eager at 10 M" in GUIDE
    (layers,) = [run for run in cpu_runs("layers.json") if "--layer" not in run["command"] and run["recipe"] == "bench-10m"]
    alone, together = layers["gains"]["compile"]["alone"], layers["gains"]["compile"]["in_plan"]
    told = [f"{one['median']:.2f}x ({one['q1']:.2f} to {one['q3']:.2f})" for one in (alone, together)]
    assert f"{told[0]} alone and {told[1]} with bf16" in GUIDE, told
    for file in re.findall(r"`(cpu/[\w-]+\.json)`", GUIDE):
        assert (folder.parent / file).is_file()


def test_the_guide_answers_every_symptom() -> None:
    headings = [line.removeprefix("## ") for line in GUIDE.splitlines() if line.startswith("## ")]
    assert headings == [
        "Low utilization", "Data wait", "Out of memory at step 1", "Out of memory later", "Slow first step", "Recompiles",
        "FP8 slower than bf16", "Loss is NaN in fp16", "Loss differs after a change", "One GPU of several is slower",
        "Flash attention is not used", "MFU is n/a, or strange", "Validation is slow", "CPU training is slow",
    ]  # fmt: skip


# --- tables of the guide


def cpu_runs(name: str) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads((ROOT / "docs" / "measurements" / "cpu" / name).read_text(encoding="utf-8"))["runs"]
    return runs


def test_memory_table_of_the_guide_is_the_measurement() -> None:
    rows = [
        f"| {run['model']} | {run['predicted_bytes'] / 2**20:,.0f} | {run['measured_bytes'] / 2**20:,.0f} | {run['error'] * 100:+.1f} % |"
        for run in cpu_runs("memory.json")
    ]
    table = "| model | predicted, MiB | measured, MiB | error |\n|---|---:|---:|---:|\n" + "\n".join(rows) + "\n\n"
    assert table in (ROOT / "docs" / "gpu-guide.md").read_text(encoding="utf-8"), table


def test_compile_table_of_the_guide_is_the_measurement() -> None:
    spreads = {run["variant"]: run["processor_seconds"] for run in cpu_runs("compile.json")}
    page = (ROOT / "docs" / "gpu-guide.md").read_text(encoding="utf-8")
    for layer in ("compile-blocks", "compile-model"):
        cold, warm = spreads[f"{layer} cold"], spreads[f"{layer} warm"]
        cells = [f"{one['median']:.{n}f} ({one['min']:.{n}f} to {one['max']:.{n}f})" for one, n in ((cold, 0), (warm, 1))]
        assert f"| `{layer}` | {cells[0]} | {cells[1]} | {warm['median'] / cold['median']:.0%}".replace("%", " %") in page, (
            cells
        )
