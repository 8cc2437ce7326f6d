"""Sample GPUs through NVML while they work. What one GPU or driver cannot tell is left out and noted once; the rest still comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

THROTTLE_REASONS = {
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}
"""Bits of nvmlDeviceGetCurrentClocksEventReasons that slow training, in NVML's order. Idle is not among them."""
ALL_LINKS = 0xFFFFFFFF
"""Scope of an NVLink field that stands for the sum over the links of a GPU."""

READS: dict[str, Callable[[Any, Any], Any]] = {
    "utilization": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
    "memory_bytes": lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
    "power_watts": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    "power_limit_watts": lambda nvml, gpu: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
    "temperature_celsius": lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
    "sm_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
    "memory_clock_mhz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
    "pcie_rx_bytes_per_second": lambda nvml, gpu: 1000 * nvml.nvmlDeviceGetPcieThroughput(gpu, nvml.NVML_PCIE_UTIL_RX_BYTES),
    "pcie_tx_bytes_per_second": lambda nvml, gpu: 1000 * nvml.nvmlDeviceGetPcieThroughput(gpu, nvml.NVML_PCIE_UTIL_TX_BYTES),
    "throttle": lambda nvml, gpu: throttle_reasons(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)),
}
"""Key -> its value now."""
COUNTERS: dict[str, Callable[[Any, Any], int]] = {
    "nvlink_rx_bytes_per_second": lambda nvml, gpu: _link_bytes(nvml, gpu, nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX),
    "nvlink_tx_bytes_per_second": lambda nvml, gpu: _link_bytes(nvml, gpu, nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX),
    "energy_joules": lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000,
}
"""Key -> a counter since the driver was loaded, of which the key tells the growth."""


def throttle_reasons(bits: int) -> list[str]:
    """Return the names of the reasons that slow training."""
    return [name for bit, name in THROTTLE_REASONS.items() if bits & bit]


class GpuSampler:
    """Reads GPUs, given by rank and UUID. `nvml` is an initialized pynvml, `note` takes a line about what cannot be read."""

    def __init__(self, nvml: Any, uuids: Mapping[int, str], note: Callable[[str], None]) -> None:
        self._nvml, self._uuids, self._note = nvml, dict(uuids), note
        self._handles: dict[int, Any] = {}
        self._unsupported: set[tuple[int, str]] = set()
        self._noted: set[str] = set()
        self._counters: dict[tuple[int, str], tuple[float, float]] = {}
        """(rank, key) -> time and value of the counter: of the previous sample; for energy of the first one."""
        for rank, uuid in self._uuids.items():
            handle = self._ask(rank, "handle", lambda nvml, uuid: nvml.nvmlDeviceGetHandleByUUID(uuid), uuid)
            if handle is not None:
                self._handles[rank] = handle

    def read(self) -> dict[int, dict[str, Any]]:
        """Return by rank the keys of READS and COUNTERS that its GPU tells. A GPU that is lost has no entry."""
        found: dict[int, dict[str, Any]] = {}
        for rank in list(self._handles):
            values = {key: self._ask(rank, key, read, self._handles.get(rank)) for key, read in READS.items()}
            values |= {key: self._growth(rank, key) for key in COUNTERS}
            if rank in self._handles:
                found[rank] = {key: value for key, value in values.items() if value is not None}
        return found

    def _growth(self, rank: int, key: str) -> float | None:
        """Return bytes per second since the previous sample, or joules since the first one."""
        value, now = self._ask(rank, key, COUNTERS[key], self._handles.get(rank)), time.monotonic()
        if value is None:
            return None
        since, before = self._counters.setdefault((rank, key), (now, value))
        if key == "energy_joules":
            return value - before
        self._counters[rank, key] = now, value
        return max(0.0, value - before) / (now - since) if now > since else None

    def _ask(self, rank: int, key: str, read: Callable[[Any, Any], Any], argument: Any) -> Any:
        """Return what NVML says, or None. Not supported: never asked again. GPU lost: left out from now on. Each is noted once."""
        if argument is None or (rank, key) in self._unsupported:
            return None
        nvml = self._nvml
        try:
            return read(nvml, argument)
        except nvml.NVMLError as error:
            if key == "handle" or isinstance(error, nvml.NVMLError_GpuIsLost):
                self._handles.pop(rank, None)
                self._once(f"GPU of rank {rank} ({self._uuids[rank]}): {error}; no samples of it from here on")
                return None
            if isinstance(error, nvml.NVMLError_NotSupported | nvml.NVMLError_FunctionNotFound):
                self._unsupported.add((rank, key))
            self._once(f"gpu/{key}: not read ({error})")
        return None

    def _once(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            self._note(text)


def _link_bytes(nvml: Any, gpu: Any, field: int) -> int:
    """Return the bytes that a GPU's NVLinks transferred, which NVML counts in KiB. Raises an NVML error, also the field's own."""
    answer = nvml.nvmlDeviceGetFieldValues(gpu, [(field, ALL_LINKS)])[0]
    if answer.nvmlReturn:
        raise nvml.NVMLError(answer.nvmlReturn)
    return 1024 * int(answer.value.ullVal)
