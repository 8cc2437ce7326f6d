"""Samples of GPUs through the real nvidia-ml-py in a child process, on the fake libnvidia-ml.so.1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_nvml import NEEDED, SOURCE, compile_library

pytestmark = NEEDED

A, B = (f"GPU-{head}-d72c-4106-c12f-20bd9faed9f6" for head in ("8932f937", "11223344"))
H100 = "9 0 85520809984 700000 0 NVIDIA H100 80GB HBM3"
WHOLE = (
    "state busy 50\nstate used 1000000\nstate drawn 300500\nstate clock 1500\nstate memclock 2600\nstate celsius 60\n"
    "state reasons 5\nstate energy 5000\nstate pcie 1000\nstate linked 100\n"
)
TWO = f"gpu {A} 00000000:3B:00.0 {H100}\n{WHOLE}gpu {B} 00000000:5E:00.0 {H100}\n{WHOLE}"
CHILD = """
import json, os, sys
from gptoughts.hardware.gpu_sampler import GpuSampler
from gptoughts.hardware.nvml import opened, read_gpus
notes = []
uuids = {rank: gpu.uuid for rank, gpu in enumerate(read_gpus(os.environ).gpus)}
with opened() as nvml:
    sampler = GpuSampler(nvml, uuids, notes.append)
    samples = [sampler.read() for _ in range(int(sys.argv[1]))]
print(json.dumps({"samples": samples, "notes": notes}))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def sampled(library: Path, tmp_path: Path) -> Any:
    """A function that takes samples of the box that `text` describes: the samples, and the notes."""

    def samples(text: str, count: int = 3, **environment: str) -> tuple[list[dict[str, Any]], list[str]]:
        (tmp_path / "box").write_text(text)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("CUDA_")}
        fake = {"FAKE_NVML": str(tmp_path / "box"), "LD_LIBRARY_PATH": str(library)}
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(count)],
            env={**inherited, **fake, **environment},
            cwd=SOURCE.parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        return found["samples"], found["notes"]

    return samples


def test_every_key_is_read_in_its_unit(sampled: Any) -> None:
    samples, notes = sampled(TWO)
    assert notes == [] and [sorted(sample) for sample in samples] == [["0", "1"]] * 3
    newest = samples[-1]["0"]
    speeds = {key: newest.pop(key) for key in ("nvlink_rx_bytes_per_second", "nvlink_tx_bytes_per_second")}
    assert min(speeds.values()) > 0 and "nvlink_rx_bytes_per_second" not in samples[0]["0"], "no speed before a second reading"
    assert newest == {
        "utilization": 50,
        "memory_bytes": 1000000,
        "power_watts": 300.5,
        "power_limit_watts": 700.0,
        "temperature_celsius": 60,
        "sm_clock_mhz": 1500,
        "memory_clock_mhz": 2600,
        "pcie_rx_bytes_per_second": 1000000,
        "pcie_tx_bytes_per_second": 1000000,
        "throttle": ["power cap"],
        "energy_joules": 10.0,
    }


def test_only_visible_gpus_in_their_order(sampled: Any) -> None:
    busy = TWO.replace("state busy 50", "state busy 90", 1)
    assert [gpu["utilization"] for gpu in sampled(busy, 1)[0][0].values()] == [90, 50]
    assert [gpu["utilization"] for gpu in sampled(busy, 1, CUDA_VISIBLE_DEVICES="1,0")[0][0].values()] == [50, 90]
    assert [gpu["utilization"] for gpu in sampled(busy, 1, CUDA_VISIBLE_DEVICES=A)[0][0].values()] == [90]


def test_what_is_not_supported_is_left_out_and_noted_once(sampled: Any) -> None:
    samples, notes = sampled(TWO + "fail nvmlDeviceGetPowerUsage 3\nfail nvmlDeviceGetFieldValues 3\n")
    keys = {key for sample in samples for gpu in sample.values() for key in gpu}
    assert "power_watts" not in keys and "nvlink_tx_bytes_per_second" not in keys and "energy_joules" in keys
    assert sorted(notes) == [
        "gpu/nvlink_rx_bytes_per_second: not read (Not Supported)",
        "gpu/nvlink_tx_bytes_per_second: not read (Not Supported)",
        "gpu/power_watts: not read (Not Supported)",
    ]


def test_a_failure_that_may_pass_is_asked_again(sampled: Any) -> None:
    samples, notes = sampled(TWO + "fail nvmlDeviceGetTemperature 999 1\n")
    assert all("temperature_celsius" in sample["0"] and "temperature_celsius" not in sample["1"] for sample in samples)
    assert len(notes) == 1 and "gpu/temperature_celsius" in notes[0]


def test_a_gpu_that_is_lost_ends_only_its_own_samples(sampled: Any) -> None:
    samples, notes = sampled(TWO + "lost 1 2\n", 4)
    assert [sorted(sample) for sample in samples] == [["0", "1"], ["0"], ["0"], ["0"]]
    assert notes == [f"GPU of rank 1 ({B}): GPU is lost; no samples of it from here on"]
