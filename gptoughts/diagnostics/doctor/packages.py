"""Installed packages by their metadata: which extras are whole, and whether torch's build can use the GPUs. Imports none of them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gptoughts.diagnostics.doctor.finding import Finding
from gptoughts.hardware.machine import Machine
from gptoughts.hardware.packages import extras

# Without these there is no training; the rest of the extra `train` has a narrower use.
NEEDED = ("torch", "numpy", "safetensors", "tokenizers", "rich")

LOST = "the whole GPU"

EXTRAS: dict[str, tuple[str, ...]] = {"train": (), **extras()}
"""Extras that a user installs, with their requirements."""


def lacking(requirements: tuple[str, ...], packages: dict[str, str]) -> list[str]:
    """The requirements that `packages` (name -> version) does not meet, as `torch` or `torch>=2.10 (here 2.9.1)`."""
    missing = []
    for requirement in requirements:
        name = re.split(r"[\[<>=]", requirement)[0]
        version = packages.get(name)
        parts = [name, *([f"{name}-torch"] if "[pytorch]" in requirement else [])]
        absent = [part for part in parts if part not in packages]
        if version is None or absent:
            missing += absent
        elif not _within(version, requirement):
            missing.append(f"{requirement} (here {version})")
    return missing


def _within(version: str, requirement: str) -> bool:
    """Whether `version` keeps every `>=` and `<` bound of `requirement`, compared by the numbers of its release."""
    return all(
        (_release(version) >= _release(bound)) == (sign == ">=") for sign, bound in re.findall(r"(>=|<)([\d.]+)", requirement)
    )


def _release(version: str) -> tuple[int, ...]:
    """`2.13.0+cu130` as (2, 13): trailing zeros do not count."""
    match = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in match[0].split(".")] if match else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def package_findings(machine: Machine, lacking_train: list[str]) -> Iterator[Finding]:
    """What the extra `train` lacks."""
    absent = [name for name in lacking_train if " " not in name]
    odd = [words for words in lacking_train if " " in words]
    # Without an NVIDIA driver the CPU build saves 2 GB; pip prefers it because +cpu sorts after the plain version.
    cpu_build = "torch" in absent and machine.system == "linux" and machine.driver is None
    mend = "pip install 'gptoughts[train]'"
    mend += " --extra-index-url https://download.pytorch.org/whl/cpu" if cpu_build else ""
    if absent:
        yield Finding(f"missing: {', '.join(absent)}", mend, "stops" if set(absent) & set(NEEDED) else "minor")
    if odd:
        yield Finding(f"another version is needed: {', '.join(odd)}", mend, "costs")


def torch_findings(machine: Machine) -> Iterator[Finding]:
    """Whether torch's build can use the GPUs that are here."""
    version = machine.packages.get("torch")
    if version is None or not machine.gpus:
        return
    mend = "pip install --force-reinstall 'torch>=2.10,<2.14' --index-url https://download.pytorch.org/whl/"
    build, least = cuda_of_build(version), machine.min_capability()
    if "+cpu" in version:
        yield Finding(f"torch {version} is a CPU build: training would not use the GPU", mend + wheels(machine), "costs", LOST)
    elif build is None:
        return
    elif machine.cuda and build[0] > int(machine.cuda.split(".")[0]):
        what = f"torch {version} needs a driver for CUDA {build[0]}; driver {machine.driver} carries CUDA {machine.cuda}"
        yield Finding(what, mend + wheels(machine), "costs", LOST)
    elif least is not None and least >= (10, 0) and build < (12, 8):
        yield Finding(f"torch {version} has no kernels for Blackwell, which needs CUDA 12.8", mend + "cu130", "costs", LOST)
    elif least is not None and least < (7, 5) and build >= (13, 0):
        yield Finding(
            f"torch {version} has no kernels for GPUs before Turing, CUDA 13 left them", mend + "cu126", "costs", LOST
        )


def cuda_of_build(version: str) -> tuple[int, int] | None:
    """`2.13.0+cu130` as (13, 0); None where the version does not say."""
    match = re.search(r"\+cu(\d+)(\d)\b", version)
    return (int(match[1]), int(match[2])) if match else None


def wheels(machine: Machine) -> str:
    """The folder of PyTorch's index whose build this driver runs: a driver runs all builds of its own major version."""
    return "cu130" if machine.cuda and int(machine.cuda.split(".")[0]) >= 13 else "cu126"
