"""doctor: what it finds on machines of every kind, what it tells to type, and when it lets training start."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from gptoughts.cli import doctor as command
from gptoughts.diagnostics.doctor import forks
from gptoughts.diagnostics.doctor.diagnosis import diagnose, examine, space_findings
from gptoughts.diagnostics.doctor.finding import Check, Finding
from gptoughts.diagnostics.doctor.forks import Job, Outcome
from gptoughts.diagnostics.doctor.host import shared_memory_findings
from gptoughts.diagnostics.doctor.packages import EXTRAS, NEEDED, lacking
from gptoughts.diagnostics.doctor.text import text
from gptoughts.hardware.machine import Machine, read

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "tests/machines").glob("*.json"))
# What the machine files have beside the shared memory of the machine that runs the tests.
HERE = ("/dev/shm",)


def box(stem: str, **changes: Any) -> Machine:
    return dataclasses.replace(read(ROOT / f"tests/machines/{stem}.json"), **changes)


def torch(stem: str, version: str, **changes: Any) -> Machine:
    machine = box(stem)
    return dataclasses.replace(machine, packages={**machine.packages, "torch": version}, **changes)


def findings(machine: Machine, folder: Path = ROOT) -> list[Finding]:
    return [one for one in diagnose(machine, folder).findings if not one.what.startswith(HERE)]


def test_extras_are_those_of_pyproject() -> None:
    written = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name: sorted(lines) for name, lines in EXTRAS.items()} == {
        name: sorted(lines) for name, lines in written.items() if name != "dev"
    }
    assert set(NEEDED) <= {line.split(">")[0] for line in EXTRAS["train"]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_machine_with_its_packages_is_ready(path: Path) -> None:
    diagnosis = diagnose(read(path), ROOT)
    lines = text(diagnosis)
    assert diagnosis.ready == (path.stem != "cpu")
    assert all(len(line) <= 140 for line in lines)
    assert sum(line.startswith("gpu ") for line in lines) == max(1, len(diagnosis.machine.gpus))
    assert lines[-1].startswith("next: ")
    assert json.loads(json.dumps(diagnosis.to_json()))["ready"] == diagnosis.ready


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "cpu"], ids=lambda path: path.stem)
def test_nothing_to_mend_on_the_machine_files(path: Path) -> None:
    assert findings(read(path)) == []
    assert diagnose(read(path), ROOT).next_line == "next: gptoughts train"


def test_peaks_are_printed_once_for_equal_gpus_and_for_each_kind() -> None:
    assert sum("dense peaks" in line for line in text(diagnose(box("h100x8"), ROOT))) == 1
    assert sum("dense peaks" in line for line in text(diagnose(box("mixed"), ROOT))) == 2
    machine = box("h100")
    sliced = dataclasses.replace(machine, gpus=(dataclasses.replace(machine.gpus[0], name="NVIDIA H20", memory_bytes=None),))
    lines = "\n".join(text(diagnose(sliced, ROOT)))
    assert "peaks n/a" in lines and "n/a, 700 W" in lines
    assert diagnose(sliced, ROOT).to_json()["peaks"] == [None]


def test_without_torch_the_cpu_build_is_offered_where_there_is_no_driver() -> None:
    (found,) = [one for one in findings(box("cpu")) if one.weight == "stops"]
    assert found.mend == "pip install 'gptoughts[train]' --extra-index-url https://download.pytorch.org/whl/cpu"
    assert diagnose(box("cpu"), ROOT).next_line == f"next: {found.mend}"
    (found,) = findings(box("h100", packages={}))
    assert found.mend == "pip install 'gptoughts[train]'"
    (found,) = [one for one in findings(box("cpu", system="darwin")) if one.weight == "stops"]
    assert found.mend == "pip install 'gptoughts[train]'"


def test_a_missing_luxury_does_not_stop() -> None:
    machine = box("h100")
    without = {name: version for name, version in machine.packages.items() if name != "matplotlib"}
    (found,) = findings(dataclasses.replace(machine, packages=without))
    assert (found.what, found.weight) == ("missing: matplotlib", "minor")


@pytest.mark.parametrize(
    ("machine", "said", "wheels"),
    [
        (torch("h100", "2.13.0+cpu"), "is a CPU build", "cu130"),
        (torch("h100", "2.13.0+cpu", cuda="12.4"), "is a CPU build", "cu126"),
        (torch("h100", "2.13.0+cu130", cuda="12.8", driver="570.1"), "needs a driver for CUDA 13", "cu126"),
        (torch("b200x8", "2.13.0+cu126"), "no kernels for Blackwell", "cu130"),
        (torch("rtx5090", "2.13.0+cu126"), "no kernels for Blackwell", "cu130"),
    ],
)
def test_a_torch_build_that_does_not_fit(machine: Machine, said: str, wheels: str) -> None:
    (found,) = findings(machine)
    assert said in found.what
    assert found.mend.endswith(f"/whl/{wheels}")
    diagnosis = diagnose(machine, ROOT)
    assert diagnosis.ready
    assert diagnosis.next_line == f"next: {found.mend}"


def test_volta_and_cuda_13() -> None:
    machine = box("t4")
    volta = dataclasses.replace(machine.gpus[0], name="Tesla V100-SXM2-16GB", compute_capability=(7, 0))
    whats = [found.what for found in findings(dataclasses.replace(machine, gpus=(volta,)))]
    assert any("before Turing" in what for what in whats)


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0+cu126", "2.13.0+cu130", "2.10.0+cu128", "2.11.0a0+git123"])
def test_a_torch_build_that_fits_or_does_not_tell(version: str) -> None:
    assert findings(torch("h100", version)) == []


@pytest.mark.parametrize(
    ("packages", "missing"),
    [
        ({"torch": "2.13.0+cu130"}, []),
        ({"torch": "2.10"}, []),
        ({"torch": "2.10.0"}, []),
        ({"torch": "2.9.1"}, ["torch>=2.10,<2.14 (found 2.9.1)"]),
        ({"torch": "2.14.0"}, ["torch>=2.10,<2.14 (found 2.14.0)"]),
        ({"torch": "nonsense"}, ["torch>=2.10,<2.14 (found nonsense)"]),
        ({}, ["torch"]),
    ],
)
def test_versions(packages: dict[str, str], missing: list[str]) -> None:
    assert lacking(("torch>=2.10,<2.14",), packages) == missing


def test_an_old_torch_is_found_and_does_not_stop() -> None:
    found, _ = findings(torch("h100", "2.9.1+cu128"))
    assert (found.weight, found.what) == ("costs", "unsupported version: torch>=2.10,<2.14 (found 2.9.1+cu128)")


def test_transformer_engine_needs_its_torch_part() -> None:
    assert lacking(EXTRAS["fp8"], {"transformer-engine": "2.8.0"}) == ["transformer-engine-torch"]
    assert lacking(EXTRAS["fp8"], {"transformer-engine": "2.8.0", "transformer-engine-torch": "2.8.0"}) == []
    assert lacking(EXTRAS["fp8"], {}) == ["transformer-engine", "transformer-engine-torch"]


def test_space(tmp_path: Path) -> None:
    small = [*space_findings(tmp_path, 1 << 30), *shared_memory_findings(64 << 20)]
    assert [found.weight for found in small] == ["stops", "minor"]
    assert "1.00 GiB free" in small[0].what and "/dev/shm: 64 MiB" in small[1].what
    assert space_findings(tmp_path, None) == space_findings(tmp_path, 1 << 40) == []
    assert list(shared_memory_findings(None)) == list(shared_memory_findings(1 << 40)) == []
    assert diagnose(box("h100"), tmp_path / "nowhere").disk_free_bytes is None


def test_macos_has_no_shared_memory_row() -> None:
    lines = text(diagnose(box("cpu-avx512-bf16", system="darwin"), ROOT))
    assert not any(line.startswith("/dev/shm") for line in lines)


def test_findings_are_printed_worst_first_with_their_cost() -> None:
    found = [
        Finding("a note", "type this", "minor"),
        Finding("a loss", "type that", "costs", "half of it", "published, somebody"),
        Finding("an end", "type these", "stops"),
    ]
    checks = (Check("speed", ("gpu 0: fast",), tuple(found), {"gpu": 1.0}), Check("limits", ("many",)))
    diagnosis = diagnose(box("h100"), ROOT, checks, "not tried: much")
    lines = [line for line in text(diagnosis) if "/dev/shm" not in line]
    start = lines.index("findings, worst first")
    assert lines[start + 1 : start + 8] == [
        "  stops  an end",
        "         type these",
        "  costs  a loss",
        "         costs: half of it [published, somebody]",
        "         type that",
        "  minor  a note",
        "         type this",
    ]
    assert lines[-1] == "next: type these" and not diagnosis.ready
    assert "speed     gpu 0: fast" in lines and "limits    many" in lines and "not tried: much" in lines
    value = diagnosis.to_json()
    assert value["checks"]["speed"] == {"rows": ["gpu 0: fast"], "figures": {"gpu": 1.0}}
    assert value["left_out"] == "not tried: much"
    assert [one["weight"] for one in value["findings"]][:2] == ["stops", "costs"]
    assert value["findings"][1]["costs"] == "half of it"


# A child that leaves only torch and what plans among the packages: every check runs, and only one import takes long.
CHILD = """
import sys
from dataclasses import replace
from gptoughts.cli import doctor
from gptoughts.hardware.machine import probe
here = probe()
slow = ("torchao", "liger-kernel", "transformers", "peft", "bitsandbytes")
few = {name: version for name, version in here.packages.items() if name not in slow}
doctor.probe = lambda: replace(here, packages=few)
code = doctor.doctor(json=sys.argv[1] == "json", quick=sys.argv[2] == "quick")
assert not {"torch", "numpy", "transformers"} & set(sys.modules)
sys.exit(code)
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-c", CHILD, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_quick_on_this_machine_as_text_and_as_json(tmp_path: Path) -> None:
    plain, structured = run(tmp_path, "text", "quick"), run(tmp_path, "json", "quick")
    assert not plain.stderr and not structured.stderr
    value = json.loads(structured.stdout)
    assert plain.returncode == structured.returncode == (0 if value["ready"] else 1)
    assert plain.stdout.splitlines()[-1] == f"next: {value['next']}"
    assert set(value["extras"]) == set(EXTRAS)
    assert value["folder"] == str(tmp_path)
    assert Machine.from_json(value["machine"])
    assert set(value["checks"]) >= {"limits"} and "speed" not in value["checks"]
    assert command.QUICK in plain.stdout and value["left_out"] == command.QUICK


@pytest.mark.slow
def test_all_of_it_on_this_machine_leaves_nothing_behind(tmp_path: Path) -> None:
    done = run(tmp_path, "json", "all")
    assert not done.stderr
    value = json.loads(done.stdout)
    assert done.returncode == (0 if value["ready"] else 1)
    assert set(value["checks"]) >= {"limits", "imports", "speed", "ranks", "disk"} and value["left_out"] == ""
    assert value["checks"]["imports"]["figures"]["torch"]["version"] == value["machine"]["packages"]["torch"]
    assert [one["what"] for one in value["findings"] if one["weight"] == "stops"] == []
    for check in ("speed", "ranks", "disk"):
        assert value["checks"][check]["rows"] and value["checks"][check]["figures"]
    assert list(tmp_path.iterdir()) == []


def test_a_torch_that_does_not_import_stops_and_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudnn.so.9: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    machine = box("cpu-avx512-bf16", packages={"torch": "2.13.0+cpu"})
    checks = examine(machine, tmp_path)
    (stops,) = [one for check in checks for one in check.findings if one.weight == "stops"]
    assert "torch 2.13.0+cpu: import failed: OSError: libcudnn.so.9" in stops.what
    assert stops.mend == "pip install --force-reinstall 'torch>=2.10,<2.14' --index-url https://download.pytorch.org/whl/cpu"
    assert {"speed", "ranks"}.isdisjoint(check.name for check in checks), "they would repeat what torch said"
    assert not diagnose(machine, tmp_path, checks).ready


def test_gpus_that_torch_cannot_use_are_said_once(tmp_path: Path) -> None:
    machine = box("mixed", packages={"torch": "2.13.0+cu130", "c++": "g++"})
    checks = {check.name: check for check in examine(machine, tmp_path)}
    if checks["imports"].figures["torch"]["cuda"] is not None:
        pytest.skip("torch has CUDA here, and may have GPUs")
    (told,) = checks["imports"].findings
    assert told.what == "torch is built without CUDA" and told.mend.endswith("cu130")
    assert checks["speed"].rows == ("not measured",) and "ranks" not in checks, "they would repeat what torch said"
    assert checks["speed"].findings == ()


@pytest.mark.parametrize("again", [True, False])
def test_a_wrong_sum_is_tried_again_without_peer_to_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    """The processes are stood in for: no box here has two GPUs whose copies are lost."""
    machine = box("mixed", packages={"torch": "2.13.0+cu130", "c++": "g++"})
    asked: list[list[str]] = []

    def told(jobs: list[Job], *_: Any) -> dict[str, Outcome]:
        asked.append([job.name for job in jobs])
        right = again and len(asked) > 1
        one = {"backend": "nccl", "right": right, "ring": True, "bus_gb_s": 1.0}
        copies = {"pairs": [{"from": 0, "to": 1, "right": True, "zeros": False, "gb_s": 1.0}]}
        speeds = {"tflops": {"bfloat16": 300.0}, "copy_gb_s": 5000.0, "to_gpu_gb_s": 1.0, "from_gpu_gb_s": 1.0}
        whole = {"written_mb": 1.0, "write_mb_s": 500.0, "read_mb_s": 500.0, "cache": "avoided", "wrong_blocks": 0}
        known = {
            "import": {"version": "2", "cuda": "13.0", "gpus": 2, "architectures": []},
            "disk": whole,
            "speed": speeds,
            "peers": copies,
        }
        return {job.name: Outcome(job.name, known.get(job.name.split()[0], one), 0, "", 1.0) for job in jobs}

    monkeypatch.setattr(forks, "run", told)
    checks = {check.name: check for check in examine(machine, tmp_path)}
    assert [name for name in asked[1] if name.startswith("rank")] == [f"rank {rank} without peer-to-peer" for rank in (0, 1)]
    (found,) = checks["ranks"].findings
    assert found.weight == "stops" and found.what.startswith("all-reduce over 2 ranks (NCCL) is wrong")
    assert found.mend == ("export NCCL_P2P_DISABLE=1" if again else "NCCL_DEBUG=INFO gptoughts doctor --json")


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptoughts.diagnostics.doctor.diagnosis import look

    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    (stops,) = [one for check in look(box("cpu"), tmp_path) for one in check.findings if one.weight == "stops"]
    assert stops.what == f"{tmp_path}: not writable" and "--run-dir" in stops.mend


def test_without_torch_nothing_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # no package's metadata lies there
    assert command.doctor(False) == 1
    printed = capsys.readouterr().out
    assert "next: pip install 'gptoughts[train]'" in printed and command.WITHOUT_TORCH in printed
