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

from gptoughts.commands import doctor as command
from gptoughts.commands.doctor import EXTRAS, NEEDED, Finding, diagnose, lacking, text
from gptoughts.machine import Machine, read

ROOT = Path(__file__).parent.parent
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
    assert {name: list(lines) for name, lines in EXTRAS.items()} == {
        name: lines for name, lines in written.items() if name != "dev"
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
        ({"torch": "2.9.1"}, ["torch>=2.10,<2.14 (here 2.9.1)"]),
        ({"torch": "2.14.0"}, ["torch>=2.10,<2.14 (here 2.14.0)"]),
        ({"torch": "nonsense"}, ["torch>=2.10,<2.14 (here nonsense)"]),
        ({}, ["torch"]),
    ],
)
def test_versions(packages: dict[str, str], missing: list[str]) -> None:
    assert lacking(("torch>=2.10,<2.14",), packages) == missing


def test_an_old_torch_is_found_and_does_not_stop() -> None:
    (found,) = findings(torch("h100", "2.9.1+cu128"))
    assert (found.weight, found.what) == ("costs", "another version is needed: torch>=2.10,<2.14 (here 2.9.1+cu128)")


def test_transformer_engine_needs_its_torch_part() -> None:
    assert lacking(EXTRAS["fp8"], {"transformer-engine": "2.8.0"}) == ["transformer-engine-torch"]
    assert lacking(EXTRAS["fp8"], {"transformer-engine": "2.8.0", "transformer-engine-torch": "2.8.0"}) == []
    assert lacking(EXTRAS["fp8"], {}) == ["transformer-engine", "transformer-engine-torch"]


def test_space(tmp_path: Path) -> None:
    small = list(command._space_findings(tmp_path, 1 << 30, 64 << 20))
    assert [found.weight for found in small] == ["stops", "minor"]
    assert "1.0 GiB free" in small[0].what and "/dev/shm holds 64 MiB" in small[1].what
    assert list(command._space_findings(tmp_path, None, None)) == []
    assert list(command._space_findings(tmp_path, 1 << 40, 1 << 40)) == []
    assert diagnose(box("h100"), tmp_path / "nowhere").disk_free_bytes is None


def test_macos_has_no_shared_memory_row() -> None:
    lines = text(diagnose(box("cpu-avx512-bf16", system="darwin"), ROOT))
    assert not any(line.startswith("/dev/shm") for line in lines)


def run(folder: Path, argument: bool, *packages: Path) -> subprocess.CompletedProcess[str]:
    child = f"import sys; from gptoughts.commands.doctor import doctor; code = doctor({argument});"
    child += "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules); sys.exit(code)"
    path = os.pathsep.join(map(str, (ROOT, *packages)))
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-c", child], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_on_this_machine_as_text_and_as_json(tmp_path: Path) -> None:
    plain, structured = run(tmp_path, False), run(tmp_path, True)
    assert not plain.stderr and not structured.stderr
    value = json.loads(structured.stdout)
    assert plain.returncode == structured.returncode == (0 if value["ready"] else 1)
    assert plain.stdout.splitlines()[-1] == f"next: {value['next']}"
    assert set(value["extras"]) == set(EXTRAS)
    assert value["folder"] == str(tmp_path)
    assert Machine.from_json(value["machine"])


def test_exit_code_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # no package's metadata lies there
    assert command.doctor(False) == 1
    assert "next: pip install 'gptoughts[train]'" in capsys.readouterr().out
