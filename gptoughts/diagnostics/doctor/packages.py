"""Check package metadata without importing: which extras are complete, and whether torch's build can use the GPUs."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gptoughts.diagnostics.doctor.finding import Finding
from gptoughts.hardware.machine import Machine
from gptoughts.hardware.packages import extras

# Required for training; the rest of the extra `train` is optional.
NEEDED = ("torch", "numpy", "safetensors", "tokenizers", "rich")

LOST = "the GPU is not used"

EXTRAS: dict[str, tuple[str, ...]] = {"train": (), **extras()}
"""Extras that a user installs, with their requirements."""


def lacking(requirements: tuple[str, ...], packages: dict[str, str]) -> list[str]:
    """Return the requirements that `packages` (name -> version) does not meet, as `torch` or `torch>=2.10 (found 2.9.1)`."""
    missing = []
    for requirement in requirements:
        name = re.split(r"[\[<>=]", requirement)[0]
        version = packages.get(name)
        parts = [name, *([f"{name}-torch"] if "[pytorch]" in requirement else [])]
        absent = [part for part in parts if part not in packages]
        if version is None or absent:
            missing += absent
        elif not _within(version, requirement):
            missing.append(f"{requirement} (found {version})")
    return missing


def _within(version: str, requirement: str) -> bool:
    """Return whether `version` satisfies every `>=` and `<` bound of `requirement`, by release numbers."""
    return all(
        (release(version) >= release(bound)) == (sign == ">=") for sign, bound in re.findall(r"(>=|<)([\d.]+)", requirement)
    )


def release(version: str) -> tuple[int, ...]:
    """Return `2.13.0+cu130` as (2, 13), without trailing zeros."""
    match = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in match[0].split(".")] if match else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def package_findings(machine: Machine, lacking_train: list[str]) -> Iterator[Finding]:
    """Yield findings on missing or unsupported packages of the extra `train`."""
    absent = [name for name in lacking_train if " " not in name]
    odd = [words for words in lacking_train if " " in words]
    # Without an NVIDIA driver the CPU build saves 2 GB; pip prefers it because +cpu sorts after the plain version.
    cpu_build = "torch" in absent and machine.system == "linux" and machine.driver is None
    mend = "pip install 'gptoughts[train]'"
    mend += " --extra-index-url https://download.pytorch.org/whl/cpu" if cpu_build else ""
    if absent:
        yield Finding(f"missing: {', '.join(absent)}", mend, "stops" if set(absent) & set(NEEDED) else "minor")
    if odd:
        yield Finding(f"unsupported version: {', '.join(odd)}", mend, "costs")


def torch_findings(machine: Machine) -> Iterator[Finding]:
    """Yield a finding if torch's build cannot use the GPUs."""
    version = machine.packages.get("torch")
    if version is None or not machine.gpus:
        return
    mend = "pip install --force-reinstall 'torch>=2.10,<2.14' --index-url https://download.pytorch.org/whl/"
    build, least = cuda_of_build(version), machine.min_capability()
    if "+cpu" in version:
        yield Finding(f"torch {version} is a CPU build: the GPU is not used", mend + wheels(machine), "costs", LOST)
    elif build is None:
        return
    elif machine.cuda and build[0] > int(machine.cuda.split(".")[0]):
        what = f"torch {version} needs a driver for CUDA {build[0]}; driver {machine.driver} supports CUDA {machine.cuda}"
        yield Finding(what, mend + wheels(machine), "costs", LOST)
    elif least is not None and least >= (10, 0) and build < (12, 8):
        yield Finding(f"torch {version} has no kernels for Blackwell, which needs CUDA 12.8", mend + "cu130", "costs", LOST)
    elif least is not None and least < (7, 5) and build >= (13, 0):
        yield Finding(
            f"torch {version} has no kernels for GPUs before Turing, dropped in CUDA 13", mend + "cu126", "costs", LOST
        )


def cuda_of_build(version: str) -> tuple[int, int] | None:
    """Return (13, 0) for `2.13.0+cu130`; None if the version has no CUDA tag."""
    match = re.search(r"\+cu(\d+)(\d)\b", version)
    return (int(match[1]), int(match[2])) if match else None


def wheels(machine: Machine) -> str:
    """Return the folder of PyTorch's index for this driver: a driver runs all builds of its major CUDA version."""
    return "cu130" if machine.cuda and int(machine.cuda.split(".")[0]) >= 13 else "cu126"
