"""Read NVML while GPUs work: throttle reasons, power limits, temperature, ECC errors, the PCIe link, other processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from time import monotonic
from typing import Any

from gptoughts.console import GIB, bytes_in_words
from gptoughts.diagnostics.doctor.finding import UNKNOWN, Check, Finding
from gptoughts.hardware.gpu_sampler import THROTTLE_REASONS
from gptoughts.hardware.machine import Machine
from gptoughts.hardware.nvml import opened

# Below this a desktop or the driver's context uses the memory; above it a compute process.
FOREIGN_BYTES = GIB
EVERY_SECONDS = 0.2


@dataclass(frozen=True)
class State:
    """Snapshot of one GPU; None if NVML does not report a value. Clocks in MHz, limits in watts."""

    index: int
    reasons: tuple[str, ...] | None = None
    clock: int | None = None
    most_clock: int | None = None
    celsius: int | None = None
    limit: float | None = None
    usual_limit: float | None = None
    persistent: bool | None = None
    ecc: bool | None = None
    uncorrected: int | None = None
    link_width: int | None = None
    most_link_width: int | None = None
    used_bytes: int | None = None
    note: str = ""


class Watch:
    """Worst state of each GPU over repeated reads."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.seen = machine, 0.0
        self.before = read_states(machine)
        self.worst = {state.index: state for state in self.before}

    def __call__(self) -> None:
        """Read the states again, at most every EVERY_SECONDS."""
        if not self.machine.gpus or monotonic() - self.seen < EVERY_SECONDS:
            return
        self.seen = monotonic()
        for state in read_states(self.machine):
            known = self.worst.get(state.index, state)
            both = (*(known.reasons or ()), *(state.reasons or ()))
            reasons = (
                tuple(word for word in THROTTLE_REASONS.values() if word in both)
                if known.reasons or state.reasons
                else state.reasons
            )
            hottest = max((one for one in (known.celsius, state.celsius) if one is not None), default=None)
            # The throttled clock if there is one, else the highest: an idle clock is not meaningful.
            faster = max(known, state, key=lambda one: one.clock or 0)
            lowered = state if state.reasons else known if known.reasons else faster
            self.worst[state.index] = replace(lowered, reasons=reasons, celsius=hottest)

    def check(self) -> Check:
        """Return the check of the worst states, with the memory used before our own processes started."""
        used = {state.index: state.used_bytes for state in self.before}
        return judge(self.machine, [replace(state, used_bytes=used.get(state.index)) for state in self.worst.values()])


def read_states(machine: Machine) -> list[State]:
    """Return the states of whole GPUs; empty without GPUs or NVML. MIG instances have no clocks of their own."""
    wanted = {gpu.uuid: gpu.index for gpu in machine.gpus if gpu.uuid and not gpu.mig}
    if not wanted:
        return []
    found = []
    try:
        with opened() as nvml:
            for number in range(nvml.nvmlDeviceGetCount()):
                handle = nvml.nvmlDeviceGetHandleByIndex(number)
                index = wanted.get(nvml.nvmlDeviceGetUUID(handle))
                if index is not None:
                    found.append(_state(nvml, handle, index))
    except Exception as error:  # driver error: keep the states read so far
        read = {state.index for state in found}
        found += [State(index, note=f"NVML failed: {error}") for index in wanted.values() if index not in read]
    return sorted(found, key=lambda state: state.index)


def _state(nvml: Any, handle: Any, index: int) -> State:
    def ask(call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(handle, *arguments)
        except nvml.NVMLError:  # not supported by this GPU or driver
            return None

    bits = ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
    limit, usual = ask(nvml.nvmlDeviceGetEnforcedPowerLimit), ask(nvml.nvmlDeviceGetPowerManagementDefaultLimit)
    persistent, ecc, memory = (
        ask(nvml.nvmlDeviceGetPersistenceMode),
        ask(nvml.nvmlDeviceGetEccMode),
        ask(nvml.nvmlDeviceGetMemoryInfo),
    )
    return State(
        index=index,
        reasons=None if bits is None else tuple(word for bit, word in THROTTLE_REASONS.items() if bits & bit),
        clock=ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        most_clock=ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
        celsius=ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        limit=limit / 1000 if limit else None,
        usual_limit=usual / 1000 if usual else None,
        persistent=None if persistent is None else bool(persistent),
        ecc=None if ecc is None else bool(ecc[0]),
        uncorrected=ask(nvml.nvmlDeviceGetTotalEccErrors, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC),
        link_width=ask(nvml.nvmlDeviceGetCurrPcieLinkWidth),
        most_link_width=ask(nvml.nvmlDeviceGetMaxPcieLinkWidth),
        used_bytes=int(memory.used) if memory else None,
    )


def judge(machine: Machine, states: Iterable[State]) -> Check:
    """Return one row and the findings of each GPU."""
    seen = list(states)
    if not seen:
        return Check("clocks")
    findings = [finding for state in seen for finding in _findings(state, machine)]
    if any(state.persistent is False for state in seen):
        what = "persistence mode is off: the driver loads again for each first process"
        findings.append(Finding(what, "sudo nvidia-smi -pm 1", "minor", "seconds at each start, not measured"))
    return Check("clocks", tuple(_rows(seen)), tuple(findings), {"gpus": [asdict(state) for state in seen]})


def _rows(states: list[State]) -> Iterator[str]:
    for state in states:
        if state.note:
            yield f"gpu {state.index}: {state.note}"
            continue
        held = UNKNOWN if state.reasons is None else ", ".join(state.reasons) or "none"
        heat = UNKNOWN if state.celsius is None else f"{state.celsius} C"
        ecc = UNKNOWN if state.ecc is None else "on" if state.ecc else "off"
        yield f"gpu {state.index}: {state.clock or UNKNOWN} of {state.most_clock or UNKNOWN} MHz, {heat}, throttle reasons: {held}; ECC {ecc}"


def _findings(state: State, machine: Machine) -> Iterator[Finding]:
    gpu, reasons = f"GPU {state.index}", state.reasons or ()
    look = f"nvidia-smi -i {state.index} -q -d PERFORMANCE,POWER,TEMPERATURE,CLOCK"
    costs = f"clock {state.clock} of {state.most_clock} MHz" if state.clock and state.most_clock else UNKNOWN
    if "heat (software)" in reasons or "heat (hardware)" in reasons:
        heat = f" at {state.celsius} C" if state.celsius is not None else ""
        yield Finding(f"{gpu}: thermal throttling{heat}", f"check the cooling; {look}", "costs", costs, "NVML, under load")
    if "power brake" in reasons or "hardware slowdown" in reasons:
        yield Finding(f"{gpu}: power brake or hardware slowdown", f"check the power cables; {look}", "costs", costs, "NVML")
    if "application clocks" in reasons and (state.clock or 0) < (state.most_clock or 0):
        mend = f"sudo nvidia-smi -i {state.index} -rac && sudo nvidia-smi -i {state.index} -rgc"
        yield Finding(f"{gpu}: application clocks are set below the maximum", mend, "costs", costs, "NVML")
    if state.limit and state.usual_limit and state.limit < state.usual_limit - 1:
        what = f"{gpu}: power limit {state.limit:.0f} W, default {state.usual_limit:.0f} W"
        yield Finding(
            what,
            f"sudo nvidia-smi -i {state.index} -pl {state.usual_limit:.0f}",
            "costs",
            costs if "power cap" in reasons else UNKNOWN,
        )
    if state.uncorrected:
        what = f"{gpu}: {state.uncorrected} uncorrectable ECC errors since the driver was loaded"
        mend = f"sudo nvidia-smi -i {state.index} -r; if errors return, replace the card"
        yield Finding(what, mend, "costs", "aborted runs or wrong numbers")
    if state.link_width and state.most_link_width and state.link_width < state.most_link_width:
        what = f"{gpu}: {state.link_width} of {state.most_link_width} PCIe lanes"
        lost = f"copies to and from the host at {state.link_width / state.most_link_width:.0%} of their rate"
        yield Finding(what, "reseat the card, or use a full-width slot", "costs", lost, "arithmetic")
    if state.used_bytes is not None and state.used_bytes > FOREIGN_BYTES:
        free = [other.index for other in machine.gpus if other.index != state.index]
        mend = f"nvidia-smi -i {state.index}" + (
            f"; or leave it out: CUDA_VISIBLE_DEVICES={','.join(map(str, free))}" if free else ""
        )
        yield Finding(
            f"{gpu}: other processes use {bytes_in_words(state.used_bytes)}",
            mend,
            "costs",
            "that memory and a share of compute time",
        )
