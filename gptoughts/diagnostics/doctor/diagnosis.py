"""Collect all checks of the machine into one diagnosis."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptoughts.console import GIB, bytes_in_words
from gptoughts.diagnostics.doctor import clocks, disk, forks, host, imports, ranks, speed
from gptoughts.diagnostics.doctor.advisories import advisory_findings
from gptoughts.diagnostics.doctor.finding import Check, Finding, worst_first
from gptoughts.diagnostics.doctor.packages import EXTRAS, lacking, package_findings, torch_findings
from gptoughts.errors import GptoughtsError
from gptoughts.hardware.machine import Machine
from gptoughts.hardware.peak_flops import peaks

# A small run writes tokens, two checkpoints and logs.
LEAST_DISK_BYTES = 2 * GIB


@dataclass(frozen=True)
class Diagnosis:
    """Everything that doctor prints; findings are worst first. `left_out` names the checks that did not run, and why."""

    machine: Machine
    extras: dict[str, list[str]]
    folder: str
    disk_free_bytes: int | None
    shm_bytes: int | None
    profile: str | None
    findings: list[Finding]
    checks: tuple[Check, ...] = ()
    left_out: str = ""

    @property
    def ready(self) -> bool:
        """Return whether training can start."""
        return not any(finding.weight == "stops" for finding in self.findings)

    @property
    def next_line(self) -> str:
        """Return the next command for the user."""
        worst = [finding for finding in self.findings if finding.weight != "minor"]
        return f"next: {worst[0].mend}" if worst else "next: gptoughts train"

    def to_json(self) -> dict[str, Any]:
        """Return the diagnosis as JSON values."""
        found = [peaks(gpu.name, gpu.memory_bytes) for gpu in self.machine.gpus]
        return {
            "machine": self.machine.to_json(),
            "peaks": [asdict(one) if one else None for one in found],
            "extras": {name: {"installed": not lacking, "lacking": lacking} for name, lacking in self.extras.items()},
            "folder": self.folder,
            "disk_free_bytes": self.disk_free_bytes,
            "shm_bytes": self.shm_bytes,
            "profile": self.profile,
            "checks": {check.name: {"rows": list(check.rows), "figures": check.figures} for check in self.checks},
            "left_out": self.left_out,
            "findings": [asdict(finding) for finding in self.findings],
            "ready": self.ready,
            "next": self.next_line.removeprefix("next: "),
        }


def diagnose(machine: Machine, folder: Path, checks: tuple[Check, ...] = (), left_out: str = "") -> Diagnosis:
    """Return the diagnosis of a machine record and the disk of `folder`, with the findings of `checks`."""
    from gptoughts.planning.profile import pick

    extras = {name: lacking(requirements, machine.packages) for name, requirements in EXTRAS.items()}
    used, shared = _usage(folder), _usage(Path("/dev/shm")) if machine.system == "linux" else None
    disk_free_bytes, shm_bytes = used[1] if used else None, shared[0] if shared else None
    findings = [
        *package_findings(machine, extras["train"]),
        *torch_findings(machine),
        *advisory_findings(machine.packages),
        *space_findings(folder, disk_free_bytes),
        *host.path_findings(os.environ),
        *host.shared_memory_findings(shm_bytes),
        *(finding for check in checks for finding in check.findings),
    ]
    profile = None
    try:
        profile = pick("auto", machine).name
    except GptoughtsError as error:
        findings.append(Finding(str(error).splitlines()[0], "gptoughts profiles", "minor"))
    return Diagnosis(machine, extras, str(folder), disk_free_bytes, shm_bytes, profile, worst_first(findings), checks, left_out)


def look(machine: Machine, folder: Path) -> tuple[Check, ...]:
    """Run the checks that take no time: process limits and GPU states."""
    return (_host(machine), clocks.Watch(machine).check(), *_writable(folder))


def examine(machine: Machine, folder: Path) -> tuple[Check, ...]:
    """Run all checks, in child processes: about ten seconds on an idle machine; every job has a deadline."""
    if "torch" not in machine.packages:
        return look(machine, folder)
    watch = clocks.Watch(machine)
    environment = dict(os.environ)
    with tempfile.TemporaryDirectory() as meeting:
        at_once = max(1, machine.cpu.usable_cores)
        # Imports first, one per core; the measurements after them run alone.
        jobs = [*imports.jobs(machine), *disk.jobs(folder), *speed.jobs(machine), *ranks.jobs(machine, meeting)]
        tried = forks.run(jobs, at_once, watch)
        packages, done = imports.judge(machine, tried), {name: one for name, one in tried.items() if one.tried}
        first = tried["import torch"]
        if first.trouble or (machine.gpus and not (first.figures or {}).get("gpus")):
            done = {name: one for name, one in done.items() if name == "disk"}  # the others would repeat the error of torch
        together = ranks.judge(machine, _of_ranks(done), environment)
        if len(machine.gpus) > 1 and together.findings:
            again = forks.run(ranks.jobs(machine, meeting, ranks.NO_P2P, " without peer-to-peer"), at_once)
            together = ranks.judge(machine, _of_ranks(done), environment, again)
    used = _usage(folder)
    measured = (speed.judge(machine, done), together, disk.judge(folder, done.get("disk"), used[1] if used else None))
    checks = (_host(machine), watch.check(), packages, *measured, _cut_short(tried))
    return tuple(check for check in checks if check.rows or check.findings)


def _cut_short(tried: dict[str, forks.Outcome]) -> Check:
    """Return a finding if the process that runs the checks died, usually out of memory."""
    missed = [one for one in tried.values() if not one.tried]
    if not missed or tried["import torch"].trouble:
        return Check("checks")
    what = f"{len(missed)} checks not run, their process: {missed[0].trouble}"
    return Check("checks", (), (Finding(what, "gptoughts doctor --quick", "minor"),))


def _of_ranks(outcomes: dict[str, forks.Outcome]) -> dict[str, forks.Outcome]:
    return {name: outcome for name, outcome in outcomes.items() if name.startswith(("peers", "rank "))}


def _host(machine: Machine) -> Check:
    import sysconfig

    include = sysconfig.get_paths().get("include")
    return host.check(machine, host.own_limits(), Path("/"), Path(include) if include else None)


def _writable(folder: Path) -> tuple[Check, ...]:
    """Return a finding if the folder is not writable, without writing."""
    if not folder.is_dir() or os.access(folder, os.W_OK):
        return ()
    finding = Finding(f"{folder}: not writable", "gptoughts train --run-dir FOLDER_ON_ANOTHER_DISK", "stops")
    return (Check("disk", (), (finding,)),)


def space_findings(folder: Path, disk_free_bytes: int | None) -> list[Finding]:
    """Return a finding if the disk is nearly full."""
    if disk_free_bytes is None or disk_free_bytes >= LEAST_DISK_BYTES:
        return []
    what = f"{bytes_in_words(disk_free_bytes)} free in {folder}, a run needs {bytes_in_words(LEAST_DISK_BYTES)}"
    return [Finding(what, "gptoughts train --run-dir FOLDER_ON_A_LARGER_DISK", "stops")]


def _usage(folder: Path) -> tuple[int, int] | None:
    """Return total and free bytes of the file system of `folder`."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.total, usage.free
