"""GPUs through the real nvidia-ml-py in a child process, on a fake libnvidia-ml.so.1 compiled from tests/nvml."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptoughts.hardware.machine import Gpu, Machine
from tests.support.fake_nvml import NEEDED, SOURCE, compile_library

CHILD = "import json; from gptoughts.hardware.machine import probe; print(json.dumps(probe().to_json()))"

pytestmark = NEEDED

A, B, C = (f"GPU-{head}-d72c-4106-c12f-20bd9faed9f6" for head in ("8932f937", "8932aaaa", "11223344"))
M0, M1 = "MIG-5c0ffee0-0000-5000-8000-000000000001", "MIG-5c0ffee1-0000-5000-8000-000000000002"
H100 = "9 0 85520809984 700000 0 NVIDIA H100 80GB HBM3"
THREE = f"gpu {A} 00000000:3B:00.0 {H100}\ngpu {B} 00000000:5E:00.0 {H100}\ngpu {C} 0000ABCD:86:00.0 {H100}\n"
SLICED = (
    f"gpu {A} 00000000:3B:00.0 8 0 85899345920 400000 1 NVIDIA A100-SXM4-80GB\n"
    f"mig 0 {M0} 42949672960 NVIDIA A100-SXM4-80GB MIG 3g.40gb\n"
    f"mig 2 {M1} 10737418240 NVIDIA A100-SXM4-80GB MIG 1g.10gb\n"
    f"gpu {B} 00000000:5E:00.0 8 0 85899345920 400000 0 NVIDIA A100-SXM4-80GB\n"
)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the compiled libnvidia-ml.so.1."""
    return compile_library(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def box(library: Path, tmp_path: Path) -> Any:
    """A function that probes the box which `text` describes, in a child process with that library and environment."""

    def probed(text: str, **environment: str) -> Machine:
        (tmp_path / "box").write_text(text)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("CUDA_")}
        fake = {"FAKE_NVML": str(tmp_path / "box"), "LD_LIBRARY_PATH": str(library)}
        done = subprocess.run(
            [sys.executable, "-c", CHILD],
            env={**inherited, **fake, **environment},
            cwd=SOURCE.parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        return Machine.from_json(json.loads(done.stdout))

    return probed


def uuids(machine: Machine) -> list[str]:
    return [gpu.uuid for gpu in machine.gpus]


def test_everything_is_read(box: Any) -> None:
    machine = box("driver 570.124.06\ncuda 12080\n" + THREE)
    assert (machine.driver, machine.cuda) == ("570.124.06", "12.8")
    assert machine.gpus[0] == Gpu(
        index=0,
        name="NVIDIA H100 80GB HBM3",
        uuid=A,
        compute_capability=(9, 0),
        memory_bytes=85520809984,
        free_bytes=85520809984,
        power_limit_watts=700.0,
        links=("pcie", "pcie"),
    )
    assert machine.label() == "3 x NVIDIA H100 80GB HBM3 (sm 9.0)"
    assert machine.min_capability() == (9, 0)
    assert machine.notes == ()


@pytest.mark.parametrize(
    ("wanted", "seen", "said"),
    [
        ("0", [A], ""),
        ("2,0", [C, A], ""),
        (" 1 , 2 ", [B, C], ""),
        (C, [C], ""),
        (f"{C},{A}", [C, A], ""),
        ("GPU-8932f937", [A], ""),
        ("GPU-8932f,GPU-1", [A, C], ""),
        ("GPU-8932", [], "no GPU 'GPU-8932'"),  # ambiguous
        ("GPU-", [], "no GPU 'GPU-'"),
        ("GPU-1122,0", [C], "no GPU '0'"),  # CUDA does not mix the two ways
        ("", [], "hides all 3"),
        ("-1", [], "hides all 3"),
        ("0,-1,1", [A], ""),
        ("0,9,1", [A], "no GPU '9'"),
        ("7", [], "no GPU '7'"),
        ("none", [], "no GPU 'none'"),
        ("NoDevFiles", [], "hides all 3"),
        ("1x,0", [B, A], ""),
        ("0,1,0", [], "is repeated"),
        (f"{A},GPU-8932f", [], "is repeated"),
        ("MIG-5c0ffee0", [], "no GPU 'MIG-5c0ffee0'"),
    ],
)
def test_visible_devices(box: Any, wanted: str, seen: list[str], said: str) -> None:
    machine = box(THREE, CUDA_VISIBLE_DEVICES=wanted)
    assert uuids(machine) == seen
    assert [gpu.index for gpu in machine.gpus] == list(range(len(seen)))
    assert all(len(gpu.links) == len(seen) - 1 for gpu in machine.gpus)
    assert said in "; ".join(machine.notes)
    assert bool(machine.notes) == bool(said)


def test_mig_instances_are_devices(box: Any) -> None:
    machine = box(SLICED)
    assert uuids(machine) == [M0, M1, B]
    assert [gpu.mig for gpu in machine.gpus] == [True, True, False]
    assert [gpu.memory_bytes for gpu in machine.gpus] == [42949672960, 10737418240, 85899345920]
    assert [gpu.compute_capability for gpu in machine.gpus] == [(8, 0)] * 3
    assert [gpu.power_limit_watts for gpu in machine.gpus] == [None, None, 400.0]
    assert machine.gpus[0].links == ("none", "none")
    assert "several MIG instances" in machine.notes[0]


@pytest.mark.parametrize(
    ("wanted", "seen"),
    [
        (M1, [M1]),
        ("MIG-5c0ffee1", [M1]),
        ("MIG-5c0ffee", []),
        (f"{M1},{M0}", [M1, M0]),
        ("0", [M0, M1]),
        ("1", [B]),
        (B, [B]),
    ],
)
def test_mig_selection(box: Any, wanted: str, seen: list[str]) -> None:
    assert uuids(box(SLICED, CUDA_VISIBLE_DEVICES=wanted)) == seen


def test_mig_mode_without_an_instance_is_no_device(box: Any) -> None:
    machine = box(f"gpu {A} 00000000:3B:00.0 8 0 85899345920 400000 1 NVIDIA A100-SXM4-80GB\n")
    assert machine.gpus == ()
    assert "MIG mode without an instance" in machine.notes[0]


def test_what_is_not_supported_is_none_with_a_note(box: Any) -> None:
    machine = box(f"gpu {A} 0000000F:01:00.0 -1 -1 -1 -1 -1 NVIDIA GB10\n")
    gpu = machine.gpus[0]
    assert (gpu.compute_capability, gpu.memory_bytes, gpu.power_limit_watts) == (None, None, None)
    assert gpu.architecture is None and machine.min_capability() is None
    assert machine.label() == "1 x NVIDIA GB10 (sm n/a)"
    assert [note.split(": ")[0] for note in machine.notes] == [
        f"GPU 0 (NVIDIA GB10) {what}" for what in ("memory", "power limit", "compute capability")
    ]
    assert all("Not Supported" in note for note in machine.notes)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (18, "driver/library mismatch"),
        (9, "kernel module is not loaded"),
        (4, "no permission"),
        (999, "NVML failed to initialize"),
    ],
)
def test_nvml_that_does_not_start_is_no_gpu_and_a_note(box: Any, code: int, said: str) -> None:
    machine = box(f"init {code}\n{THREE}")
    assert machine.gpus == () and machine.driver is None
    assert said in machine.notes[0]
    assert machine.label().startswith("CPU: ")


def test_a_lost_gpu_does_not_hide_the_others(box: Any) -> None:
    machine = box(THREE + "fail nvmlDeviceGetHandleByIndex_v2 15 1\n")
    assert uuids(machine) == [A, C]
    assert machine.notes == ("GPU 1: not read (GPU is lost)",)


def test_a_driver_without_versions_still_gives_its_gpus(box: Any) -> None:
    failing = ("nvmlSystemGetDriverVersion", "nvmlSystemGetCudaDriverVersion_v2", "nvmlShutdown")
    machine = box(THREE + "".join(f"fail {name} 999\n" for name in failing))
    assert (machine.driver, machine.cuda) == (None, None)
    assert len(machine.gpus) == 3
    assert len(machine.notes) == 2  # nothing was lost by a shutdown that failed


def test_nvlink_to_peers_switches_and_others(box: Any) -> None:
    to_b, to_a, switch = "link gpu 00000000:5e:00.0\n", "link gpu 00000000:3B:00.0\n", "link switch 00000000:C1:00.0\n"
    a, b, c = THREE.splitlines(keepends=True)
    machine = box(a + 4 * to_b + "link npu 0004:00:01.0\n" + b + 4 * to_a + "link gpu 00000000:3B:00.0 down\n" + c)
    assert [gpu.links for gpu in machine.gpus] == [("nvlink x4", "pcie"), ("nvlink x4", "pcie"), ("pcie", "pcie")]
    machine = box(a + 18 * switch + b + 18 * switch + c + 17 * switch, CUDA_VISIBLE_DEVICES="1,2,0")
    assert [gpu.links for gpu in machine.gpus] == [
        ("nvlink x17", "nvlink x18"),
        ("nvlink x17", "nvlink x17"),
        ("nvlink x18", "nvlink x17"),
    ]


def test_nvlink_whose_other_end_is_not_told_is_unknown(box: Any) -> None:
    a, b, _ = THREE.splitlines(keepends=True)
    machine = box(a + "link gpu 0000:5E:00.0\n" + b + "fail nvmlDeviceGetNvLinkRemotePciInfo_v2 3\n")
    assert [gpu.links for gpu in machine.gpus] == [("unknown",), ("unknown",)]
    assert "remote end not read" in machine.notes[0]


@pytest.mark.parametrize(("order", "notes"), [("FASTEST_FIRST", 1), ("PCI_BUS_ID", 0), ("", 1)])
def test_mixed_boxes_tell_of_the_order(box: Any, order: str, notes: int) -> None:
    mixed = (
        f"gpu {A} 00000000:01:00.0 8 6 25769803776 350000 -1 NVIDIA GeForce RTX 3090\n"
        f"gpu {B} 00000000:02:00.0 8 9 25757220864 450000 -1 NVIDIA GeForce RTX 4090\n"
    )
    machine = box(mixed, CUDA_DEVICE_ORDER=order)
    assert len(machine.notes) == notes
    assert machine.label() == "1 x NVIDIA GeForce RTX 3090 (sm 8.6) + 1 x NVIDIA GeForce RTX 4090 (sm 8.9)"
    assert machine.min_capability() == (8, 6)


def test_numa_node_from_sysfs(library: Path, tmp_path: Path) -> None:
    (tmp_path / "box").write_text(THREE)
    for address, node in (("0000:3b:00.0", "1"), ("0000:5e:00.0", "-1")):
        folder = tmp_path / "sys/bus/pci/devices" / address
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{node}\n")
    child = (
        "import sys; from pathlib import Path; from gptoughts.hardware.nvml import read_gpus;"
        "print([gpu.numa_node for gpu in read_gpus({}, Path(sys.argv[1])).gpus])"
    )
    environment = {**os.environ, "FAKE_NVML": str(tmp_path / "box"), "LD_LIBRARY_PATH": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", child, str(tmp_path)],
        env=environment,
        cwd=SOURCE.parents[2],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[1, None, None]", done.stderr


def test_a_library_that_is_no_nvml_is_no_gpu(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        cwd=SOURCE.parents[2],
        check=True,
        capture_output=True,
        text=True,
    )
    machine = Machine.from_json(json.loads(done.stdout))
    assert machine.gpus == ()
    assert "no NVIDIA driver" in machine.notes[0]


@pytest.mark.parametrize(
    ("capability", "word"),
    [
        ((6, 1), "pascal"),
        ((7, 0), "volta"),
        ((7, 2), "volta"),
        ((7, 5), "turing"),
        ((8, 0), "ampere"),
        ((8, 6), "ampere"),
        ((8, 9), "ada"),
        ((9, 0), "hopper"),
        ((10, 0), "blackwell"),
        ((12, 0), "blackwell"),
        ((13, 0), None),
        ((3, 5), None),
        (None, None),
    ],
)
def test_architecture(capability: tuple[int, int] | None, word: str | None) -> None:
    assert Gpu(0, "some GPU", compute_capability=capability).architecture == word
