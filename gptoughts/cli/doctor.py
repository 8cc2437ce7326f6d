"""`gptoughts doctor`: report the machine, its problems, their cost and the commands that fix them. Imports no torch, changes nothing."""

from __future__ import annotations

from json import dumps
from pathlib import Path

from gptoughts.console import print_result
from gptoughts.diagnostics.doctor.diagnosis import diagnose, examine, look
from gptoughts.diagnostics.doctor.text import text
from gptoughts.hardware.machine import probe

SKIPPED = "imports, speed of matrix products and copies, all-reduce, disk speed"
QUICK = f"skipped (--quick): {SKIPPED}"
WITHOUT_TORCH = f"skipped (torch not installed): {SKIPPED}"


def doctor(json: bool, machine_json: bool = False, quick: bool = False) -> int:
    """Print the diagnosis as text or JSON; return 0 if training can start, otherwise 1. `quick` skips checks that run something."""
    machine = probe()
    if machine_json:
        print_result(dumps(machine.to_json(), indent=2), raw=True)
        return 0
    folder = Path.cwd()
    left_out = QUICK if quick else "" if "torch" in machine.packages else WITHOUT_TORCH
    checks = (look if quick else examine)(machine, folder)
    diagnosis = diagnose(machine, folder, checks, left_out)
    print_result(dumps(diagnosis.to_json(), indent=2) if json else "\n".join(text(diagnosis)), raw=json)
    return 0 if diagnosis.ready else 1
