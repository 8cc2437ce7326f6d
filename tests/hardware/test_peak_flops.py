"""Peaks: the right figure for every part that is known, and none for a part that only looks like one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from gptoughts.hardware import peak_flops as gpus
from gptoughts.hardware.peak_flops import peaks

MACHINES = Path(__file__).parents[1] / "machines"
GB = 10**9

# name as NVML prints it: bf16, fp16, fp8, tf32 in TFLOP/s (dense, fp32 accumulate), GB/s
FIGURES = {
    "Tesla V100-SXM2-32GB": (None, 125, None, None, 900),
    "Tesla V100-PCIE-16GB": (None, 112, None, None, 900),
    "Tesla T4": (None, 65, None, None, 320),
    "NVIDIA A10": (125, 125, None, 62.5, 600),
    "NVIDIA A10G": (70, 70, None, 35, 600),
    "NVIDIA A30": (165, 165, None, 82, 933),
    "NVIDIA A40": (149.7, 149.7, None, 74.8, 696),
    "NVIDIA RTX A6000": (154.8, 154.8, None, 77.4, 768),
    "NVIDIA GeForce RTX 3090": (71, 71, None, 35.6, 936),
    "NVIDIA A100-SXM4-40GB": (312, 312, None, 156, 1555),
    "A100-SXM4-80GB": (312, 312, None, 156, 2039),
    "NVIDIA A100-PCIE-40GB": (312, 312, None, 156, 1555),
    "NVIDIA A100 80GB PCIe": (312, 312, None, 156, 1935),
    "NVIDIA L4": (121, 121, 242, 60, 300),
    "NVIDIA L40S": (362, 362, 733, 183, 864),
    "NVIDIA GeForce RTX 4090": (165.2, 165.2, 330.3, 82.6, 1008),
    "NVIDIA H100 PCIe": (756, 756, 1513, 378, 2000),
    "NVIDIA H100 80GB HBM3": (989.4, 989.4, 1978.9, 494.7, 3350),
    "NVIDIA H100 NVL": (835, 835, 1671, 418, 3900),
    "NVIDIA H200": (989, 989, 1979, 494.5, 4800),
    "NVIDIA H200 NVL": (836, 836, 1671, 418, 4800),
    "NVIDIA GH200 480GB": (990, 990, 1979, None, 4000),
    "NVIDIA GH200 144G HBM3e": (990, 990, 1979, None, 4900),
    "NVIDIA GeForce RTX 5090": (209.5, 209.5, 419, 104.8, 1792),
    "NVIDIA B200": (2250, 2250, 4500, None, 8000),
    "NVIDIA GB200": (2500, 2500, 5000, None, 8000),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures(name: str) -> None:
    found = peaks(name)
    assert found is not None
    rates = (found.bf16_tflops, found.fp16_tflops, found.fp8_tflops, found.tf32_tflops, found.bandwidth_gb_s)
    assert rates == FIGURES[name]


# Constants that respected code divides by, each two to four times off.
WRONG = [
    ("NVIDIA GeForce RTX 4090", 82.6),
    ("NVIDIA GeForce RTX 4090", 330.3),
    ("NVIDIA GeForce RTX 3090", 35.6),
    ("NVIDIA GeForce RTX 3090", 142),
    ("NVIDIA RTX A6000", 38.7),
    ("NVIDIA RTX A6000", 309.7),
    ("NVIDIA A10G", 125),
    ("NVIDIA A10", 70),
    ("NVIDIA H200", 1979),
    ("NVIDIA H100 80GB HBM3", 312),
    ("NVIDIA H100 80GB HBM3", 1979),
    ("NVIDIA H100 80GB HBM3", 756),
    ("NVIDIA H100 PCIe", 989.4),
    ("NVIDIA A100-SXM4-80GB", 156),
    ("NVIDIA A100-SXM4-80GB", 624),
    ("NVIDIA L40S", 733),
    ("NVIDIA L40S", 121),
    ("NVIDIA L4", 242),
    ("NVIDIA GeForce RTX 5090", 419),
    ("NVIDIA B200", 4500),
    ("Tesla T4", 65),
    ("Tesla V100-SXM2-32GB", 125),
]


@pytest.mark.parametrize(("name", "wrong"), WRONG)
def test_constants_seen_elsewhere_are_not_here(name: str, wrong: float) -> None:
    found = peaks(name)
    assert found is not None
    assert found.bf16_tflops != pytest.approx(wrong, rel=0.02)


UNKNOWN = [
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GeForce RTX 3080 with Max-Q Design",
    "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
    "NVIDIA H100 80GB HBM3 MIG 7g.80gb",
    "NVIDIA A100-SXM-64GB",
    "NVIDIA A100-SXM4-40C",
    "GRID A100X-4C",
    "NVIDIA H800",
    "NVIDIA H20",
    "NVIDIA L40",
    "NVIDIA L40G",
    "NVIDIA RTX 6000 Ada Generation",
    "NVIDIA A10M",
    "NVIDIA B300",
    "Tesla P100-PCIE-16GB",
    "AMD Instinct MI300X",
    "Quantum H100 80GB HBM3",
    "NVIDIA",
    "",
]


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_is_none(name: str) -> None:
    assert peaks(name) is None


def test_the_40_gb_a100_has_less_bandwidth_and_equal_rates() -> None:
    small, large = peaks("NVIDIA A100-SXM4-40GB"), peaks("NVIDIA A100-SXM4-80GB")
    assert small and large
    assert small.bf16_tflops == large.bf16_tflops
    assert small.bandwidth_gb_s is not None and large.bandwidth_gb_s is not None
    assert small.bandwidth_gb_s < large.bandwidth_gb_s


@pytest.mark.parametrize(
    ("name", "memory_bytes", "known"),
    [
        ("NVIDIA H100 80GB HBM3", 85_520_809_984, True),
        ("NVIDIA H100 80GB HBM3", 10 * GB, False),  # a slice under the name of the whole
        ("NVIDIA H100 80GB HBM3", 64 * GB, False),
        ("NVIDIA GeForce RTX 4090", 48 * (1 << 30), False),  # a rebuilt card
        ("Tesla T4", 15_634_661_376, True),  # with ECC on
        ("NVIDIA B200", 192_265_846_784, True),
        ("NVIDIA GB200", 198_674_743_296, True),
    ],
)
def test_memory_must_be_the_parts_own(name: str, memory_bytes: int, known: bool) -> None:
    assert (peaks(name, memory_bytes) is not None) == known


def test_every_row_is_sound() -> None:
    for key, (memory_gib, found) in gpus._TABLE.items():
        assert key == key.casefold() and found.source and memory_gib > 0
        rates = [found.bf16_tflops, found.fp16_tflops, found.fp8_tflops, found.tf32_tflops]
        assert all(rate is None or rate > 0 for rate in rates)
        # fp16 runs at the rate of bf16 where both exist; fp8 twice that; tf32 half.
        if found.bf16_tflops:
            assert found.fp16_tflops == found.bf16_tflops
        if found.bf16_tflops and found.fp8_tflops:
            assert found.fp8_tflops == pytest.approx(2 * found.bf16_tflops, rel=0.02)
        if found.bf16_tflops and found.tf32_tflops:
            assert found.tf32_tflops == pytest.approx(found.bf16_tflops / 2, rel=0.02)


def test_every_gpu_of_the_machine_files_is_known() -> None:
    for path in MACHINES.glob("*.json"):
        for gpu in json.loads(path.read_text())["gpus"]:
            assert peaks(gpu["name"], gpu["memory_bytes"]), gpu["name"]


def test_rows_are_frozen() -> None:
    found = peaks("NVIDIA L4")
    assert found
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.bf16_tflops = 242  # type: ignore[misc]
