"""Datasheet peaks of GPUs by the name that NVML and torch report; None for a GPU that is not in the table.

Peaks are NVIDIA's dense tensor-core figures with fp32 accumulation, at the boost clock. MFU is divided by them, so a wrong
row is worse than none: names must match exactly (an A10G is not an A10, an L40S not an L4; laptop parts, export parts
and MIG slices have no row), and a known memory size must be that of the part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gptoughts.console import GIB

# NVML and torch report less than the full memory (ECC, firmware): 14.6 GiB for a T4 of 16. A MIG slice has at most half.
MEMORY_TOLERANCE = 0.15


@dataclass(frozen=True)
class GpuPeaks:
    """Dense tensor-core peaks with fp32 accumulation in TFLOP/s, bandwidth in GB/s (10^9); None: unsupported or unknown.

    bf16 is None on Volta and Turing, fp8 before Ada: their tensor cores do not support it.
    """

    name: str
    bf16_tflops: float | None
    fp16_tflops: float | None
    fp8_tflops: float | None
    tf32_tflops: float | None
    bandwidth_gb_s: float | None
    source: str


def peaks(name: str, memory_bytes: int | None = None) -> GpuPeaks | None:
    """Return the peaks of the GPU that NVML or torch calls `name`; None if unknown.

    `memory_bytes`, if given, must be close to the memory of the part, so that a slice or a modified card with the same name
    has no peaks.
    """
    words = name.casefold().split()
    if words[:1] == ["nvidia"]:
        words = words[1:]
    if words[:1] == ["tesla"]:
        words = words[1:]
    row = _TABLE.get(" ".join(words))
    if row is None:
        return None
    memory_gib, found = row
    if memory_bytes is not None and abs(memory_bytes / (memory_gib * GIB) - 1) > MEMORY_TOLERANCE:
        return None
    return found


def _row(name: str, memory_gib: float, *peaks: Any) -> tuple[float, GpuPeaks]:
    """Return one row of the table: dense TFLOP/s in bf16, fp16, fp8 and tf32, bandwidth in GB/s, source."""
    return memory_gib, GpuPeaks(name, *peaks)


_VOLTA = "NVIDIA Tesla V100 datasheet (DS-V100)"
_TURING = "NVIDIA T4 datasheet; Turing has no bf16 tensor cores"
_A100 = "NVIDIA A100 Tensor Core GPU datasheet"
_GA102 = "NVIDIA Ampere GA102 GPU architecture white paper, appendix"
_ADA = "NVIDIA Ada GPU architecture white paper, appendix A"
_H100 = "NVIDIA H100 Tensor Core GPU datasheet and Hopper architecture white paper, halved from the sparse figures"
_H200 = "NVIDIA H200 Tensor Core GPU datasheet, halved from the sparse figures"
_GH200 = "NVIDIA GH200 Grace Hopper Superchip datasheet, not re-read"
_A10G = "NVIDIA A10G datasheet (the part of AWS G5, not the A10), not re-read"
_RTX5090 = "NVIDIA RTX Blackwell GPU architecture white paper, appendix A"
# NVIDIA's pages disagree on the tf32 figures of data-center Blackwell, so they are left out. Bandwidth is the
# datasheet's; the driver reports 7,672 GB/s for a B200.
_B200 = "NVIDIA HGX B200 datasheet, halved from the sparse figures"
_GB200 = "NVIDIA GB200 NVL72 datasheet, per GPU, halved from the sparse figures"

# name without "NVIDIA" and "Tesla", casefolded: memory in GiB, and peaks
#                                            GiB    bf16    fp16     fp8   tf32   GB/s
_TABLE: dict[str, tuple[float, GpuPeaks]] = {
    "v100-sxm2-16gb": _row("V100 SXM2 16 GB", 16, None, 125.0, None, None, 900.0, _VOLTA),
    "v100-sxm2-32gb": _row("V100 SXM2 32 GB", 32, None, 125.0, None, None, 900.0, _VOLTA),
    "v100-pcie-16gb": _row("V100 PCIe 16 GB", 16, None, 112.0, None, None, 900.0, _VOLTA),
    "v100-pcie-32gb": _row("V100 PCIe 32 GB", 32, None, 112.0, None, None, 900.0, _VOLTA),
    "t4": _row("T4", 16, None, 65.0, None, None, 320.0, _TURING),
    "a10": _row("A10", 24, 125.0, 125.0, None, 62.5, 600.0, "NVIDIA A10 datasheet"),
    "a10g": _row("A10G", 24, 70.0, 70.0, None, 35.0, 600.0, _A10G),
    "a30": _row("A30", 24, 165.0, 165.0, None, 82.0, 933.0, "NVIDIA A30 datasheet, not re-read"),
    "a40": _row("A40", 48, 149.7, 149.7, None, 74.8, 696.0, "NVIDIA A40 datasheet"),
    # Workstation GA102 has the full rate with fp32 accumulation, GeForce GA102 half of it.
    "rtx a6000": _row("RTX A6000", 48, 154.8, 154.8, None, 77.4, 768.0, _GA102),
    "geforce rtx 3090": _row("GeForce RTX 3090", 24, 71.0, 71.0, None, 35.6, 936.0, _GA102),
    "a100-sxm4-40gb": _row("A100 SXM 40 GB", 40, 312.0, 312.0, None, 156.0, 1555.0, _A100),
    "a100-sxm4-80gb": _row("A100 SXM 80 GB", 80, 312.0, 312.0, None, 156.0, 2039.0, _A100),
    "a100-pcie-40gb": _row("A100 PCIe 40 GB", 40, 312.0, 312.0, None, 156.0, 1555.0, _A100),
    "a100 80gb pcie": _row("A100 PCIe 80 GB", 80, 312.0, 312.0, None, 156.0, 1935.0, _A100),
    "l4": _row("L4", 24, 121.0, 121.0, 242.0, 60.0, 300.0, "NVIDIA L4 datasheet, halved from the sparse figures"),
    "l40s": _row("L40S", 48, 362.0, 362.0, 733.0, 183.0, 864.0, "NVIDIA L40S datasheet"),
    "geforce rtx 4090": _row("GeForce RTX 4090", 24, 165.2, 165.2, 330.3, 82.6, 1008.0, _ADA),
    "h100 pcie": _row("H100 PCIe", 80, 756.0, 756.0, 1513.0, 378.0, 2000.0, _H100),
    "h100 80gb hbm3": _row("H100 SXM", 80, 989.4, 989.4, 1978.9, 494.7, 3350.0, _H100),
    "h100 nvl": _row("H100 NVL", 94, 835.0, 835.0, 1671.0, 418.0, 3900.0, _H100),
    "h200": _row("H200 SXM", 141, 989.0, 989.0, 1979.0, 494.5, 4800.0, _H200),
    "h200 nvl": _row("H200 NVL", 141, 836.0, 836.0, 1671.0, 418.0, 4800.0, _H200),
    # The number in these names is the memory of the Grace CPU; 480GB and 120GB carry 96 GB of HBM3.
    "gh200 480gb": _row("GH200 96 GB", 96, 990.0, 990.0, 1979.0, None, 4000.0, _GH200),
    "gh200 120gb": _row("GH200 96 GB", 96, 990.0, 990.0, 1979.0, None, 4000.0, _GH200),
    "gh200 144g hbm3e": _row("GH200 144 GB", 144, 990.0, 990.0, 1979.0, None, 4900.0, _GH200),
    "geforce rtx 5090": _row("GeForce RTX 5090", 32, 209.5, 209.5, 419.0, 104.8, 1792.0, _RTX5090),
    "b200": _row("B200", 180, 2250.0, 2250.0, 4500.0, None, 8000.0, _B200),
    "gb200": _row("GB200", 186, 2500.0, 2500.0, 5000.0, None, 8000.0, _GB200),
}
