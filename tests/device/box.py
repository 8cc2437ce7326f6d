"""What has to be known of the box that figures were taken on: versions, GPU, power limit, clocks before and after."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict
from typing import Any

from gptoughts.hardware.machine import Machine, probe

CLOCKS = {"sm_mhz": "NVML_CLOCK_SM", "memory_mhz": "NVML_CLOCK_MEM"}


def machine_facts() -> dict[str, Any]:
    """The machine and the versions; floor 0 only, so a parent that never loads torch can ask."""
    here = probe()
    gpu = here.gpus[0] if here.gpus else None
    return {
        "label": here.label(),
        "gpu": gpu.name if gpu else None,
        "gpu_facts": asdict(gpu) if gpu else None,
        "driver": here.driver,
        "cuda_of_driver": here.cuda,
        "python": platform.python_version(),
        "torch": here.packages.get("torch"),
        "packages": here.packages,
        "cores": here.cpu.usable_cores,
        "memory_bytes": here.memory_bytes,
        "load_average": round(os.getloadavg()[0], 2),
        "commit": _commit(),
        "clocks_at_start": clocks(here),
    }


def _commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def clocks(here: Machine | None = None) -> dict[str, Any]:
    """Clocks, temperature, power and what holds the clocks down, as NVML tells them now; empty without a GPU."""
    here = here or probe()
    if not here.gpus or not here.gpus[0].uuid:
        return {}
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"not read": str(error)}
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(here.gpus[0].uuid)
        return _read(pynvml, handle)
    except pynvml.NVMLError as error:
        return {"not read": str(error)}
    finally:
        pynvml.nvmlShutdown()


def _read(nvml: Any, handle: Any) -> dict[str, Any]:
    asked: dict[str, tuple[Any, ...]] = {
        name: (nvml.nvmlDeviceGetClockInfo, getattr(nvml, kind)) for name, kind in CLOCKS.items()
    }
    asked["most_sm_mhz"] = (nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM)
    asked["celsius"] = (nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU)
    asked["milliwatts"] = (nvml.nvmlDeviceGetPowerUsage,)
    asked["milliwatts_limit"] = (nvml.nvmlDeviceGetEnforcedPowerLimit,)
    # The newer name for the same bits; an older package has only the second.
    reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
    asked["event_reasons_bits"] = (reasons,)
    read: dict[str, Any] = {}
    for name, (call, *more) in asked.items():
        try:
            read[name] = call(handle, *more)
        except nvml.NVMLError as error:
            read[name] = f"not read: {error}"
    return read
