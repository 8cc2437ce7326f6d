"""`gptoughts doctor`: what is here, what is missing, and the line that mends it. Imports no torch, changes nothing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from typing import Any, Literal

from gptoughts.errors import GptoughtsError
from gptoughts.gpus import GpuPeaks, peaks
from gptoughts.machine import Gpu, Machine, probe

GIB = 1 << 30
# A small run writes tokens, two checkpoints and records; below this it would end in a full disk.
LEAST_DISK_BYTES = 2 * GIB
# NCCL and worker processes pass data through /dev/shm; containers give it 64 MiB unless told otherwise.
LEAST_SHM_BYTES = GIB
# Without these there is no training; the rest of the extra `train` has a narrower use.
NEEDED = ("torch", "numpy", "safetensors", "tokenizers", "rich")

# The extras of pyproject.toml that a user installs; a test compares.
EXTRAS: dict[str, tuple[str, ...]] = {
    "train": (
        "torch>=2.10,<2.14", "numpy>=1.26", "safetensors>=0.5", "tokenizers>=0.20", "tiktoken>=0.8",
        "zstandard>=0.22", "rich>=13", "matplotlib>=3.8",
    ),
    "hf": ("transformers>=5.17,<6", "accelerate>=1.10", "jinja2>=3.1", "datasets>=3", "pyarrow>=17"),
    "adapters": ("transformers>=5.17,<6", "peft>=0.18"),
    "qlora": ("transformers>=5.17,<6", "peft>=0.18", "bitsandbytes>=0.49"),
    "optimizers": ("pytorch-optimizer>=4.1,<5", "schedulefree>=1.4,<2"),
    "fp8": ("transformer-engine[pytorch]>=2.4",),
    "flash": ("flash-attn>=2.7",),
    "deepspeed": ("deepspeed>=0.18",),
    "wandb": ("wandb>=0.19",),
    "tensorboard": ("tensorboard>=2.18",),
    "mpi": ("mpi4py>=4",),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be, and what to type. It `stops` training, `costs` the GPU, or is `minor`."""

    what: str
    mend: str
    weight: Literal["stops", "costs", "minor"]


@dataclass(frozen=True)
class Diagnosis:
    """Everything that doctor prints."""

    machine: Machine
    extras: dict[str, list[str]]
    folder: str
    disk_free_bytes: int | None
    shm_bytes: int | None
    profile: str | None
    findings: list[Finding]

    @property
    def ready(self) -> bool:
        """Whether training can start."""
        return not any(finding.weight == "stops" for finding in self.findings)

    @property
    def next_line(self) -> str:
        """What to do now."""
        for weight in ("stops", "costs"):
            for finding in self.findings:
                if finding.weight == weight:
                    return f"next: {finding.mend}"
        return "next: gptoughts train"

    def to_json(self) -> dict[str, Any]:
        """The same as plain dicts, lists, strings and numbers."""
        found = [peaks(gpu.name, gpu.memory_bytes) for gpu in self.machine.gpus]
        return {
            "machine": self.machine.to_json(),
            "peaks": [asdict(one) if one else None for one in found],
            "extras": {name: {"installed": not lacking, "lacking": lacking} for name, lacking in self.extras.items()},
            "folder": self.folder,
            "disk_free_bytes": self.disk_free_bytes,
            "shm_bytes": self.shm_bytes,
            "profile": self.profile,
            "findings": [asdict(finding) for finding in self.findings],
            "ready": self.ready,
            "next": self.next_line.removeprefix("next: "),
        }


def doctor(json: bool, machine_json: bool = False) -> int:
    """Print what is here as text or JSON; 0 where training can start, else 1."""
    if machine_json:
        print(dumps(probe().to_json(), indent=2))
        return 0
    diagnosis = diagnose(probe(), Path.cwd())
    print(dumps(diagnosis.to_json(), indent=2) if json else "\n".join(text(diagnosis)))
    return 0 if diagnosis.ready else 1


def diagnose(machine: Machine, folder: Path) -> Diagnosis:
    """Findings on `machine`, with the disk of `folder`."""
    from gptoughts.profile import pick

    extras = {name: lacking(requirements, machine.packages) for name, requirements in EXTRAS.items()}
    disk, shm = _usage(folder), _usage(Path("/dev/shm")) if machine.system == "linux" else None
    disk_free_bytes, shm_bytes = disk[1] if disk else None, shm[0] if shm else None
    findings = [
        *_package_findings(machine, extras["train"]),
        *_torch_findings(machine),
        *_space_findings(folder, disk_free_bytes, shm_bytes),
    ]
    profile = None
    try:
        profile = pick("auto", machine).name
    except GptoughtsError as error:
        findings.append(Finding(str(error).splitlines()[0], "gptoughts profiles", "minor"))
    return Diagnosis(machine, extras, str(folder), disk_free_bytes, shm_bytes, profile, findings)


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


def _package_findings(machine: Machine, lacking_train: list[str]) -> Iterator[Finding]:
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


def _torch_findings(machine: Machine) -> Iterator[Finding]:
    """Whether torch's build can use the GPUs that are here."""
    version = machine.packages.get("torch")
    if version is None or not machine.gpus:
        return
    mend = "pip install --force-reinstall 'torch>=2.10,<2.14' --index-url https://download.pytorch.org/whl/"
    build, least = _cuda_of_build(version), machine.least_capability()
    if "+cpu" in version:
        yield Finding(f"torch {version} is a CPU build: training would not use the GPU", mend + _wheels(machine), "costs")
    elif build is None:
        return
    elif machine.cuda and build[0] > int(machine.cuda.split(".")[0]):
        what = f"torch {version} needs a driver for CUDA {build[0]}; driver {machine.driver} carries CUDA {machine.cuda}"
        yield Finding(what, mend + _wheels(machine), "costs")
    elif least is not None and least >= (10, 0) and build < (12, 8):
        yield Finding(f"torch {version} has no kernels for Blackwell, which needs CUDA 12.8", mend + "cu130", "costs")
    elif least is not None and least < (7, 5) and build >= (13, 0):
        yield Finding(f"torch {version} has no kernels for GPUs before Turing, CUDA 13 left them", mend + "cu126", "costs")


def _cuda_of_build(version: str) -> tuple[int, int] | None:
    """`2.13.0+cu130` as (13, 0); None where the version does not say."""
    match = re.search(r"\+cu(\d+)(\d)\b", version)
    return (int(match[1]), int(match[2])) if match else None


def _wheels(machine: Machine) -> str:
    """The folder of PyTorch's index whose build this driver runs: a driver runs all builds of its own major version."""
    return "cu130" if machine.cuda and int(machine.cuda.split(".")[0]) >= 13 else "cu126"


def _space_findings(folder: Path, disk_free_bytes: int | None, shm_bytes: int | None) -> Iterator[Finding]:
    if disk_free_bytes is not None and disk_free_bytes < LEAST_DISK_BYTES:
        what = f"{_gib(disk_free_bytes)} free in {folder}, a run needs {_gib(LEAST_DISK_BYTES)}"
        yield Finding(what, "gptoughts train --run-dir FOLDER_ON_A_LARGER_DISK", "stops")
    if shm_bytes is not None and shm_bytes < LEAST_SHM_BYTES:
        what = f"/dev/shm holds {_gib(shm_bytes)}, several ranks want {_gib(LEAST_SHM_BYTES)}"
        yield Finding(what, "docker run --shm-size=8g ..., or mount -o remount,size=8g /dev/shm", "minor")


def _usage(folder: Path) -> tuple[int, int] | None:
    """Total and free bytes of the file system that holds `folder`."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.total, usage.free


def text(diagnosis: Diagnosis) -> list[str]:
    """The lines that `gptoughts doctor` prints."""
    machine = diagnosis.machine
    rows = [
        ("system", f"{machine.system}, Python {machine.python}"),
        ("cpu", f"{machine.cpu.model}, {machine.cpu.usable_cores} of {machine.cpu.logical_cores} cores usable"),
        ("", " ".join(machine.cpu.instruction_sets) or "instruction sets n/a"),
        ("memory", _gib(machine.memory_bytes)),
        *_gpu_rows(machine),
        ("torch", _torch_words(machine)),
        ("disk", f"{_gib(diagnosis.disk_free_bytes)} free in {diagnosis.folder}"),
        *([("/dev/shm", _gib(diagnosis.shm_bytes))] if machine.system == "linux" else []),
        ("profile", f"auto takes {diagnosis.profile}" if diagnosis.profile else "none"),
    ]
    lines = [f"{name:<10}{words}".rstrip() for name, words in rows]
    lines += ["", "extras"]
    for name, missing in diagnosis.extras.items():
        state = f"missing    pip install 'gptoughts[{name}]'    ({', '.join(missing)})" if missing else "installed"
        lines.append(f"  {name:<13}{state}")
    if machine.notes:
        lines += ["", "notes", *(f"  {note}" for note in machine.notes)]
    if diagnosis.findings:
        lines += ["", "to mend"]
        for finding in diagnosis.findings:
            lines += [f"  {finding.what}", f"    {finding.mend}"]
    return [*lines, "", diagnosis.next_line]


def _gpu_rows(machine: Machine) -> Iterator[tuple[str, str]]:
    for gpu in machine.gpus:
        watts = "n/a W" if gpu.power_limit_watts is None else f"{gpu.power_limit_watts:.0f} W"
        mig = ", MIG instance" if gpu.mig else ""
        yield f"gpu {gpu.index}", f"{gpu.name} ({gpu.capability_label}), {_gib(gpu.memory_bytes)}, {watts}{mig}"
        if _last_of_its_kind(gpu, machine):
            yield from (("", words) for words in _peak_words(peaks(gpu.name, gpu.memory_bytes)))
    links = sorted({link for gpu in machine.gpus for link in gpu.links})
    if links:
        yield "links", ", ".join(links)
    if not machine.gpus:
        yield "gpu", "none"
    if machine.driver:
        yield "driver", f"{machine.driver} (CUDA {machine.cuda or 'n/a'})"


def _last_of_its_kind(gpu: Gpu, machine: Machine) -> bool:
    """Peaks are printed once for a run of equal GPUs."""
    return gpu.index + 1 >= len(machine.gpus) or machine.gpus[gpu.index + 1].name != gpu.name


def _peak_words(found: GpuPeaks | None) -> list[str]:
    if found is None:
        return ["peaks n/a: this part is not in the table, so MFU is n/a"]
    kinds = {"bf16": found.bf16_tflops, "fp16": found.fp16_tflops, "fp8": found.fp8_tflops, "tf32": found.tf32_tflops}
    rates = ", ".join(f"{kind} {'n/a' if rate is None else f'{rate:,.4g}'}" for kind, rate in kinds.items())
    bandwidth = "n/a" if found.bandwidth_gb_s is None else f"{found.bandwidth_gb_s:,.0f}"
    return [f"dense peaks: {rates} TFLOP/s; {bandwidth} GB/s", f"source: {found.source}"]


def _torch_words(machine: Machine) -> str:
    version = machine.packages.get("torch")
    if version is None:
        return "missing"
    build = _cuda_of_build(version)
    kind = "CPU build" if "+cpu" in version else f"CUDA {build[0]}.{build[1]} build" if build else "build not told"
    return f"{version} ({kind})"


def _gib(size_bytes: int | None) -> str:
    if size_bytes is None:
        return "n/a"
    return f"{size_bytes / GIB:.1f} GiB" if size_bytes >= GIB else f"{size_bytes / (1 << 20):.0f} MiB"
