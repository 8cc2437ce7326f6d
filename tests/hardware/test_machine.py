"""Machine: strict JSON round trip, packages by metadata, ranks from the environment, and a probe that never raises."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoughts.config.loader import from_values
from gptoughts.config.model_spec import UNKNOWN
from gptoughts.errors import ConfigError
from gptoughts.hardware.machine import Cpu, Gpu, Machine, probe, read
from gptoughts.hardware.packages import extras, installed_packages, recorded_names
from gptoughts.hardware.world import World, world_from_environment
from gptoughts.layers import CATALOG
from gptoughts.planning.layer import Case, Layer

MACHINES = sorted((Path(__file__).parents[1] / "machines").glob("*.json"))
ROOT = Path(__file__).parents[2]

words = st.text(max_size=20)
whole = st.integers(0, 1 << 50)


def a(kind: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(kind, max_size=4).map(tuple)


gpus = st.builds(
    Gpu,
    index=whole,
    name=words,
    uuid=words,
    compute_capability=st.none() | st.tuples(whole, whole),
    memory_bytes=st.none() | whole,
    power_limit_watts=st.none() | st.floats(0, 1e6),
    mig=st.booleans(),
    numa_node=st.none() | whole,
    links=a(words),
)
cpus = st.builds(
    Cpu,
    model=words,
    usable_cores=whole,
    logical_cores=whole,
    instruction_sets=a(words),
    numa_nodes=whole,
    numa_cores=a(a(whole)),
)
machines = st.builds(
    Machine,
    gpus=a(gpus),
    cpu=cpus,
    memory_bytes=st.none() | whole,
    system=words,
    python=words,
    driver=st.none() | words,
    cuda=st.none() | words,
    packages=st.dictionaries(words, words, max_size=4),
    notes=a(words),
)


@given(machines)
def test_json_round_trip(machine: Machine) -> None:
    assert Machine.from_json(json.loads(json.dumps(machine.to_json()))) == machine
    hash(machine)


@given(st.builds(World, rank=whole, local_rank=whole, world_size=whole, local_world_size=whole, launcher=words))
def test_world_round_trip(world: World) -> None:
    assert World.from_json(json.loads(json.dumps(world.to_json()))) == world


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_machine_files_are_written_as_to_json_writes(path: Path) -> None:
    machine = read(path)
    assert machine.to_json() == json.loads(path.read_text())
    assert all(len(gpu.links) == len(machine.gpus) - 1 for gpu in machine.gpus)
    assert [gpu.index for gpu in machine.gpus] == list(range(len(machine.gpus)))
    assert len({gpu.uuid for gpu in machine.gpus}) == len(machine.gpus)
    assert all(gpu.architecture for gpu in machine.gpus)
    cores = [core for node in machine.cpu.numa_cores for core in node]
    assert sorted(cores) == list(range(machine.cpu.logical_cores))


def test_machine_files_are_all_there() -> None:
    assert {path.stem for path in MACHINES} == {
        "cpu", "cpu-avx512-bf16", "t4", "rtx3090", "rtx4090", "l40s", "a100x4-40gb", "a100x8-80gb", "h100", "h100x8",
        "h200x8", "b200x8", "rtx5090", "mixed",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("stem", "label", "least"),
    [
        ("h100x8", "8 x NVIDIA H100 80GB HBM3 (sm 9.0)", (9, 0)),
        ("mixed", "1 x NVIDIA GeForce RTX 3090 (sm 8.6) + 1 x NVIDIA GeForce RTX 4090 (sm 8.9)", (8, 6)),
        ("cpu", "CPU: 8 cores, Intel(R) Core(TM) i7-8550U CPU @ 1.80GHz, avx2", None),
        ("cpu-avx512-bf16", "CPU: 2 cores, Intel(R) Xeon(R) Processor, avx512_bf16", None),
    ],
)
def test_labels(stem: str, label: str, least: tuple[int, int] | None) -> None:
    machine = read(ROOT / f"tests/machines/{stem}.json")
    assert machine.label() == label
    assert machine.min_capability() == least


def test_the_least_file_by_hand() -> None:
    cpu = {"model": "some CPU", "usable_cores": 4, "logical_cores": 8}
    gpu = {"index": 0, "name": "NVIDIA L4", "compute_capability": [8, 9], "power_limit_watts": 72}
    machine = Machine.from_json({"gpus": [gpu], "cpu": cpu, "memory_bytes": None, "system": "linux", "python": "3.12.1"})
    assert machine.gpus[0].power_limit_watts == 72.0
    assert machine.packages == {} and machine.notes == ()


def broken(change: dict[str, Any], part: str | None = None) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((ROOT / "tests/machines/h100.json").read_text())
    target = {None: value, "gpu": value["gpus"][0], "cpu": value["cpu"]}[part]
    for key, new in change.items():
        if new is KeyError:
            del target[key]
        else:
            target[key] = new
    return value


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (broken({"gpu": []}), "gpu: unknown key (did you mean 'gpus'?)"),
        (broken({"memory": 5}, "gpu"), "gpus[0].memory: unknown key (did you mean 'memory_bytes'?)"),
        (
            broken({"memory_bytes": "80 GB"}, "gpu"),
            "gpus[0].memory_bytes: input should be a valid integer. Found '80 GB'",
        ),
        (broken({"memory_bytes": 80.5}, "gpu"), "gpus[0].memory_bytes: input should be a valid integer. Found 80.5"),
        (broken({"memory_bytes": 80.0}, "gpu"), "gpus[0].memory_bytes: input should be a valid integer. Found 80.0"),
        (broken({"memory_bytes": -1}, "gpu"), "gpus[0].memory_bytes: input should be greater than or equal to 0. Found -1"),
        (broken({"index": True}, "gpu"), "gpus[0].index: input should be a valid integer. Found True"),
        (broken({"mig": 0}, "gpu"), "gpus[0].mig: input should be a valid boolean. Found 0"),
        (broken({"compute_capability": [9]}, "gpu"), "gpus[0].compute_capability[1]: missing"),
        (broken({"compute_capability": [9, 0, 1]}, "gpu"), "gpus[0].compute_capability: tuple should have at most 2 items"),
        (
            broken({"compute_capability": "9.0"}, "gpu"),
            "gpus[0].compute_capability: input should be a valid array. Found '9.0'",
        ),
        (
            broken({"compute_capability": [9, "0"]}, "gpu"),
            "gpus[0].compute_capability[1]: input should be a valid integer. Found '0'",
        ),
        (broken({"power_limit_watts": False}, "gpu"), "gpus[0].power_limit_watts: input should be a valid number. Found False"),
        (broken({"power_limit_watts": float("nan")}, "gpu"), "gpus[0].power_limit_watts: input should be a finite number"),
        (broken({"power_limit_watts": -1.0}, "gpu"), "gpus[0].power_limit_watts: input should be greater than or equal to 0"),
        (broken({"power_limit_watts": 1e301}, "gpu"), "gpus[0].power_limit_watts: input should be less than or equal to"),
        (broken({"numa_nodes": -1}, "cpu"), "cpu.numa_nodes: input should be greater than or equal to 0"),
        (broken({"memory_bytes": -1}), "memory_bytes: input should be greater than or equal to 0"),
        (broken({"links": "pcie"}, "gpu"), "gpus[0].links: input should be a valid array. Found 'pcie'"),
        (broken({"name": None}, "gpu"), "gpus[0].name: input should be a valid string. Found None"),
        (broken({"name": KeyError}, "gpu"), "gpus[0].name: missing"),
        (broken({"model": KeyError}, "cpu"), "cpu.model: missing"),
        (broken({"numa_cores": [[0], 1]}, "cpu"), "cpu.numa_cores[1]: input should be a valid array. Found 1"),
        (broken({"packages": ["torch"]}), "packages: input should be an object. Found ['torch']"),
        (broken({"packages": {"torch": 2.13}}), "packages.torch: input should be a valid string. Found 2.13"),
        (broken({"cpu": None}), "cpu: input should be an object. Found None"),
        (broken({"gpus": {}}), "gpus: input should be a valid array. Found {}"),
        (broken({"kernel": 6}, "cpu"), "cpu.kernel: unknown key"),
        ([], "top level: input should be an object. Found []"),
        (None, "top level: input should be an object. Found None"),
    ],
)
def test_what_does_not_fit_is_named_with_file_and_key(value: object, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Machine.from_json(value, "box.json")
    assert str(caught.value).startswith("box.json:\n")
    assert said in str(caught.value)


def test_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Machine.from_json(broken({"system": 1, "python": 3.12, "drivers": "580"}), "box.json")
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "top level"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "box.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_folder_is_no_machine_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read it"):
        read(tmp_path)


def ranks(*values: str) -> dict[str, str]:
    return dict(zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), values, strict=True))


def test_world_of_one_and_of_torchrun() -> None:
    assert world_from_environment({"PATH": "/bin"}) == World(0, 0, 1, 1, "single")
    assert world_from_environment(ranks("5", "8", "1", "4")) == World(5, 1, 8, 4, "torchrun")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0"}, "RANK=0 without WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "without LOCAL_WORLD_SIZE"),
        (ranks("a", "2", "0", "2"), "RANK='a': not a whole number"),
        (ranks("", "2", "0", "2"), "RANK='': not a whole number"),
        (ranks("0", "2.0", "0", "-2"), "WORLD_SIZE='2.0', LOCAL_WORLD_SIZE='-2'"),
        (ranks("2", "2", "0", "2"), "contradict"),
        (ranks("1", "2", "2", "2"), "contradict"),
        (ranks("1", "2", "1", "4"), "contradict"),
        (ranks("0", "0", "0", "0"), "contradict"),
        (ranks("0", "8", "3", "8"), "contradict"),
    ],
)
def test_a_broken_launch_names_its_variables(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        world_from_environment(environment)
    assert said in str(caught.value)


def test_the_compiler_that_torch_would_find_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "c++" not in installed_packages()[0]
    for name in ("clang++", "g++", "mine++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert installed_packages()[0]["c++"] == "g++"
    monkeypatch.setenv("CXX", "mine++")
    assert installed_packages()[0]["c++"] == "mine++"


def test_packages_come_from_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def package(name: str, metadata: str | None) -> None:
        folder = tmp_path / f"{name}.dist-info"
        folder.mkdir()
        if metadata is not None:
            (folder / "METADATA").write_text(metadata)

    package("transformer_engine_torch-2.8.0", "Name: transformer_engine_torch\nVersion: 2.8.0\n")
    package("torch-2.13.0", "Name: torch\nVersion: 2.13.0\n")
    package("peft-0.18.0", "Name: peft\n")
    package("unheard_of-1.0", "Name: unheard-of\nVersion: 1.0\n")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/version.py").write_text("__version__ = '2.13.0+cu130'\ncuda = '13.0'\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found, notes = installed_packages()
    assert found == {"torch": "2.13.0+cu130", "transformer-engine-torch": "2.8.0"}
    assert len(notes) == 1 and "peft" in notes[0]
    assert found["Unheard.Of"] == "1.0" and found.get("unheard_of") == "1.0" and "peft" not in found
    (tmp_path / "torch/version.py").unlink()
    assert installed_packages()[0]["torch"] == "2.13.0"


def test_probe_of_this_machine() -> None:
    machine = probe()
    assert Machine.from_json(machine.to_json()) == machine
    assert machine.packages["nvidia-ml-py"]


def layer_needing(package: str) -> Layer:
    base = CATALOG["ieee"]
    return replace(base, name="mine", packages=((package, "mine"),))


@pytest.mark.parametrize("package", ["pytest", "PyTest", "pytest-xdist", "pytest_xdist", "import.linter"])
def test_any_installed_distribution_satisfies_a_layer(package: str) -> None:
    case = Case(probe(), UNKNOWN, from_values({"name": "x", "train.steps": 1}, "the test").recipe, World())
    assert list(layer_needing(package).rejections(case, {})) == []
    (reason,) = layer_needing("no-such-distribution").rejections(case, {})
    assert "no-such-distribution" in reason.text


def test_lookups_do_not_change_the_record_of_a_machine() -> None:
    machine = probe()
    before = json.dumps(machine.to_json())
    assert "pytest" in machine.packages and machine.packages["pytest"] == machine.packages.get("PyTest")
    assert "no-such-distribution" not in machine.packages and machine.packages.get("no-such-distribution", "none") == "none"
    with pytest.raises(KeyError):
        machine.packages["no-such-distribution"]
    assert json.dumps(machine.to_json()) == before
    assert "pytest" not in machine.to_json()["packages"]
    named = {package for layer in CATALOG.values() for package, _ in layer.packages}
    assert named <= set(recorded_names()) and set(machine.to_json()["packages"]) <= {"c++", *recorded_names()}


def test_a_machine_file_has_only_the_packages_that_it_lists() -> None:
    machine = read(ROOT / "tests/machines/h100.json")
    assert "pytest" not in machine.packages and type(machine.packages) is dict


def test_extras_without_installed_metadata_come_from_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {name: sorted(lines) for name, lines in extras().items()}
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    extras.cache_clear()
    try:
        assert {name: sorted(lines) for name, lines in extras().items()} == installed
    finally:
        extras.cache_clear()
    assert "torch>=2.10,<2.14" in installed["train"] and "dev" not in installed


def test_probe_of_macos_asks_no_nvml(tmp_path: Path) -> None:
    machine = probe({}, "darwin", tmp_path)
    assert machine.gpus == () and machine.system == "darwin"
    assert "no NVIDIA GPU: no driver for macOS" in machine.notes


def test_an_empty_file_system_does_not_raise(tmp_path: Path) -> None:
    machine = probe({}, "linux", tmp_path)
    assert machine.memory_bytes is None and machine.cpu.usable_cores >= 1
    assert any(note.startswith("memory: not read") for note in machine.notes)


def test_floor_0_loads_neither_torch_nor_numpy_nor_nvml() -> None:
    child = (
        "import sys, gptoughts.hardware.machine as m; m.read('tests/machines/h100x8.json');"
        "print([name for name in ('torch', 'numpy', 'pynvml', 'transformers', 'subprocess') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", child], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
