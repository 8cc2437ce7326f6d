"""The stages of tests/device on a CPU with tiny models: whoever has a GPU for half an hour must not lose a minute of it to a typing error."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptoughts.api import decide
from gptoughts.hardware import machine
from gptoughts.hardware.machine import Machine
from gptoughts.layers import CATALOG
from tests.device import stages, te
from tests.device.kept import Deadline, Kept
from tests.device.measure import ratios
from tests.device.turns import Job, parity_of
from tests.support.golden_files import ROOT

H100 = ROOT / "tests" / "machines" / "h100.json"


def run(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """run.sh in a place of its own."""
    environment = {
        **os.environ, "PYTHON": sys.executable, "DEVICE_WORK": str(place / "work"), "OUT": str(place / "out"),
        "SITE": str(place / "site"), "TE_DIR": str(place / "te"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [str(ROOT / "tests" / "device" / "run.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def well_equipped() -> Machine:
    """The H100 of tests/machines with every package that any layer asks for."""
    here = machine.read(H100)
    wanted = {package: "99.0" for layer in CATALOG.values() for package, _ in layer.packages}
    return replace(here, packages={**wanted, **dict.fromkeys(stages.PACKAGES.values(), "99.0"), **here.packages})


def all_jobs() -> list[Any]:
    """Of every stage, as it would be where all packages are installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "installed", lambda layer: layer in CATALOG)
        rows = [(stage, row, job) for stage, make in stages.STAGES.items() for row in make() for job in row.jobs]
    return [
        pytest.param(job, id=f"{stage}-{row.name}-{job.name}") for stage, row, job in rows if job.module == "tests.device.ours"
    ]


@pytest.mark.parametrize("job", all_jobs())
def test_every_measurement_has_a_plan_on_an_h100(job: Job) -> None:
    """Names of fields, layers and options, and what fits, without a GPU; what the plan takes is what was asked for."""
    made = decide(job.recipe, "auto", job.fields, job.layers, machine=well_equipped())
    for slot, layer in job.layers.items():
        if "." not in slot:
            assert made.plan.layers[slot] == layer
    assert isinstance(made.plan.spec.get("vocab_size"), int)


def test_names_of_measurements_are_their_own() -> None:
    for make in stages.STAGES.values():
        names = [row.name for row in make()]
        assert len(names) == len(set(names))


@pytest.mark.slow
def test_contract_on_two_layers(tmp_path: Path) -> None:
    done = run(tmp_path, "contract", "--tiny", "--only", "sdpa-modern,fixed-modern")
    assert done.returncode == 0, done.stdout + done.stderr
    kept = read(tmp_path / "out" / "contract-tiny.json")
    assert kept["machine"]["torch"]
    assert set(kept["runs"]) == {"sdpa-modern", "fixed-modern"}
    for row in kept["runs"].values():
        assert row["status"] == "active"
        assert row["passed"]
        assert row["negative"].startswith("inactive")
        assert row["operators"]
    again = run(tmp_path, "contract", "--tiny", "--only", "sdpa-modern")
    assert "1 skipped" in again.stdout, "held rows are not run again"


@pytest.mark.slow
def test_throughput_of_one_model_is_kept_and_reported(tmp_path: Path) -> None:
    done = run(tmp_path, "bf16", "--tiny", "--only", "gpt2-124m")
    assert done.returncode == 0, done.stdout + done.stderr
    kept = read(tmp_path / "out" / "bf16-tiny.json")
    (name,) = set(kept["runs"]) - {"ceilings"}
    figures = kept["runs"][name]["jobs"][name]
    assert figures["tokens_per_second"] > 0
    assert figures["plan"]["precision"]["layer"] == "bf16"
    assert [line for line in figures["evidence"] if line["status"] != "active"] == []
    assert run(tmp_path, "report", "--tiny").returncode == 0
    page = (tmp_path / "work" / "report" / "README.md").read_text(encoding="utf-8")
    assert name in page
    assert "MFU n/a" in page


def test_a_broken_measurement_leaves_its_reason_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.device.measure import turns

    monkeypatch.setenv("DEVICE_WORK", str(tmp_path))
    monkeypatch.delenv("OUT", raising=False)
    wrong = stages.Turns("wrong", (Job("wrong", "gpt2-124m", {"model.no_such_key": "1"}),))
    late = stages.Turns("late", (Job("late", "gpt2-124m", {}),), seconds=1e9)
    kept = Kept("broken")
    assert turns([wrong, late], kept, Deadline(200)) == 2
    assert "no_such_key" in read(tmp_path / "kept" / "broken.json")["failures"]["wrong"]


def test_another_machine_starts_a_new_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEVICE_WORK", str(tmp_path))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    kept = Kept("stage")
    kept.on({"gpu": "A", "torch": "1", "python": "3"})
    kept.keep("one", {"x": 1})
    same = Kept("stage")
    same.on({"gpu": "A", "torch": "1", "python": "3"})
    assert same.holds("one")
    other = Kept("stage")
    other.on({"gpu": "B", "torch": "1", "python": "3"})
    assert not other.holds("one")
    assert len(list((tmp_path / "kept").glob("stage.older-*.json"))) == 1
    assert read(tmp_path / "out" / "stage.json")["machine"]["gpu"] == "B"


def test_ratios_and_losses_of_two_that_took_turns() -> None:
    one = {"rounds": [2.0, 4.0, 6.0], "losses": [1.0] * 40}
    other = {"rounds": [1.0, 4.0, 2.0], "losses": [1.0] * 20 + [1.1] * 20}
    found = ratios(one, other, ["a", "b"])
    assert found["a / b"]["median"] == 2.0
    assert found["loss"]["relative"] == pytest.approx(0.1)
    assert parity_of([1.0] * 10, [1.0] * 10) is None


def test_rehearsal_of_the_build(tmp_path: Path) -> None:
    done = run(tmp_path, "te-build", "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the parts make the whole" in done.stdout
    assert "NVTE_NO_LOCAL_VERSION=1" in done.stdout


def test_a_wheel_with_a_part_missing_is_refused(tmp_path: Path) -> None:
    whole = b"0123456789"
    (tmp_path / "x.whl.sha256").write_text(f"{hashlib.sha256(whole).hexdigest()}  x.whl\n", encoding="utf-8")
    (tmp_path / f"x.whl{te.PART}aa").write_bytes(whole[:4])
    with pytest.raises(SystemExit, match="1 parts, 4 bytes"):
        te.joined(tmp_path)
    (tmp_path / f"x.whl{te.PART}ab").write_bytes(whole[4:])
    assert [path.read_bytes() for path in te.joined(tmp_path)] == [whole]


@pytest.mark.parametrize("words", [[], ["no-such-stage"]])
def test_what_is_no_stage_is_told(tmp_path: Path, words: list[str]) -> None:
    done = run(tmp_path, *words)
    assert done.returncode == 2
    assert "usage" in done.stderr
