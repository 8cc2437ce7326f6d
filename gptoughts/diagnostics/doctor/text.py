"""Format the diagnosis as text: the machine, then the findings, worst first."""

from __future__ import annotations

from collections.abc import Iterator

from gptoughts.console import bytes_in_words
from gptoughts.diagnostics.doctor.diagnosis import Diagnosis
from gptoughts.diagnostics.doctor.finding import UNKNOWN, Finding
from gptoughts.diagnostics.doctor.packages import cuda_of_build
from gptoughts.hardware.machine import Gpu, Machine
from gptoughts.hardware.peak_flops import GpuPeaks, peaks


def text(diagnosis: Diagnosis) -> list[str]:
    """Return the lines that `gptoughts doctor` prints."""
    machine = diagnosis.machine
    rows = [
        ("system", f"{machine.system}, Python {machine.python}"),
        ("cpu", f"{machine.cpu.model}, {machine.cpu.usable_cores} of {machine.cpu.logical_cores} cores usable"),
        ("", " ".join(machine.cpu.instruction_sets) or "instruction sets n/a"),
        ("memory", bytes_in_words(machine.memory_bytes)),
        *_gpu_rows(machine),
        *_check_rows(diagnosis, "clocks"),
        *_check_rows(diagnosis, "limits"),
        ("torch", _torch_words(machine)),
        *_check_rows(diagnosis, "imports"),
        *_check_rows(diagnosis, "speed"),
        *_check_rows(diagnosis, "ranks"),
        ("disk", f"{bytes_in_words(diagnosis.disk_free_bytes)} free in {diagnosis.folder}"),
        *(("", words) for _, words in _check_rows(diagnosis, "disk")),
        *([("/dev/shm", bytes_in_words(diagnosis.shm_bytes))] if machine.system == "linux" else []),
        ("profile", f"auto selects {diagnosis.profile}" if diagnosis.profile else "none"),
    ]
    lines = [f"{name:<10}{words}".rstrip() for name, words in rows]
    lines += ["", "extras"]
    for name, missing in diagnosis.extras.items():
        state = f"missing    pip install 'gptoughts[{name}]'    ({', '.join(missing)})" if missing else "installed"
        lines.append(f"  {name:<13}{state}")
    if machine.notes:
        lines += ["", "notes", *(f"  {note}" for note in machine.notes)]
    if diagnosis.left_out:
        lines += ["", diagnosis.left_out]
    if diagnosis.findings:
        lines += ["", "findings, worst first"]
        for finding in diagnosis.findings:
            lines += _finding_lines(finding)
    return [*lines, "", diagnosis.next_line]


def _check_rows(diagnosis: Diagnosis, name: str) -> Iterator[tuple[str, str]]:
    """Yield the rows of one check, its name beside the first."""
    for check in diagnosis.checks:
        if check.name == name:
            yield from ((name if number == 0 else "", words) for number, words in enumerate(check.rows))


def _finding_lines(finding: Finding) -> Iterator[str]:
    yield f"  {finding.weight:<7}{finding.what}"
    if finding.costs != UNKNOWN:
        yield f"         costs: {finding.costs}{f' [{finding.source}]' if finding.source else ''}"
    yield f"         {finding.mend}"


def _gpu_rows(machine: Machine) -> Iterator[tuple[str, str]]:
    for gpu in machine.gpus:
        watts = "n/a W" if gpu.power_limit_watts is None else f"{gpu.power_limit_watts:.0f} W"
        mig = ", MIG instance" if gpu.mig else ""
        yield f"gpu {gpu.index}", f"{gpu.name} ({gpu.capability_label}), {bytes_in_words(gpu.memory_bytes)}, {watts}{mig}"
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
    """Return whether the next GPU is of another model: peaks are printed once for equal GPUs."""
    return gpu.index + 1 >= len(machine.gpus) or machine.gpus[gpu.index + 1].name != gpu.name


def _peak_words(found: GpuPeaks | None) -> list[str]:
    if found is None:
        return ["peaks n/a: GPU not in the table, MFU n/a"]
    kinds = {"bf16": found.bf16_tflops, "fp16": found.fp16_tflops, "fp8": found.fp8_tflops, "tf32": found.tf32_tflops}
    rates = ", ".join(f"{kind} {'n/a' if rate is None else f'{rate:,.4g}'}" for kind, rate in kinds.items())
    bandwidth = "n/a" if found.bandwidth_gb_s is None else f"{found.bandwidth_gb_s:,.0f}"
    return [f"dense peaks: {rates} TFLOP/s; {bandwidth} GB/s", f"source: {found.source}"]


def _torch_words(machine: Machine) -> str:
    version = machine.packages.get("torch")
    if version is None:
        return "missing"
    build = cuda_of_build(version)
    kind = "CPU build" if "+cpu" in version else f"CUDA {build[0]}.{build[1]} build" if build else "unknown build"
    return f"{version} ({kind})"
