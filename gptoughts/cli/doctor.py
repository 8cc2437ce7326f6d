"""`gptoughts doctor`: what is here, what is wrong, what that costs, and the line that mends it. Imports no torch, changes nothing."""

from __future__ import annotations

from json import dumps
from pathlib import Path

from gptoughts.diagnostics.doctor.diagnosis import diagnose, examine, look
from gptoughts.diagnostics.doctor.text import text
from gptoughts.hardware.machine import probe

QUICK = "not tried (--quick): imports, speed of products and copies, sums over ranks, rates of the disk"
WITHOUT_TORCH = "not tried, for want of torch: imports, speed of products and copies, sums over ranks, rates of the disk"


def doctor(json: bool, machine_json: bool = False, quick: bool = False) -> int:
    """Print what is here as text or JSON; 0 where training can start, else 1. `quick` leaves out what has to be tried."""
    machine = probe()
    if machine_json:
        print(dumps(machine.to_json(), indent=2))
        return 0
    folder = Path.cwd()
    left_out = QUICK if quick else "" if "torch" in machine.packages else WITHOUT_TORCH
    checks = (look if quick else examine)(machine, folder)
    diagnosis = diagnose(machine, folder, checks, left_out)
    print(dumps(diagnosis.to_json(), indent=2) if json else "\n".join(text(diagnosis)))
    return 0 if diagnosis.ready else 1
