"""What NVML says of GPUs at work: why a clock is lowered, power limits, heat, memory errors, the PCIe link, who else is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from time import monotonic
from typing import Any

from gptoughts.console import GIB, bytes_in_words
from gptoughts.diagnostics.doctor.finding import UNKNOWN, Check, Finding
from gptoughts.hardware.machine import Machine
from gptoughts.hardware.nvml import opened

# Bits of nvmlDeviceGetCurrentClocksEventReasons that slow training, in NVML's order. An idle clock is none.
REASONS = {
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}
# Below this somebody's desktop or the driver's own context holds the memory; above it a process computes.
FOREIGN_BYTES = GIB
EVERY_SECONDS = 0.2


@dataclass(frozen=True)
class State:
    """One GPU at one moment; None is what NVML does not tell. Clocks in MHz, limits in watts."""

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
    """Reads the states of the machine's GPUs again and again, and keeps the worst of each."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.seen = machine, 0.0
        self.before = read_states(machine)
        self.worst = {state.index: state for state in self.before}

    def __call__(self) -> None:
        """Look once more."""
        if not self.machine.gpus or monotonic() - self.seen < EVERY_SECONDS:
            return
        self.seen = monotonic()
        for state in read_states(self.machine):
            known = self.worst.get(state.index, state)
            both = (*(known.reasons or ()), *(state.reasons or ()))
            reasons = (
                tuple(word for word in REASONS.values() if word in both) if known.reasons or state.reasons else state.reasons
            )
            hottest = max((one for one in (known.celsius, state.celsius) if one is not None), default=None)
            # The clock that something holds down, else the highest: an idle clock says nothing.
            faster = max(known, state, key=lambda one: one.clock or 0)
            lowered = state if state.reasons else known if known.reasons else faster
            self.worst[state.index] = replace(lowered, reasons=reasons, celsius=hottest)

    def check(self) -> Check:
        """The judgment on what was seen, with the memory that was in use before anything of ours ran."""
        used = {state.index: state.used_bytes for state in self.before}
        return judge(self.machine, [replace(state, used_bytes=used.get(state.index)) for state in self.worst.values()])


def read_states(machine: Machine) -> list[State]:
    """The states of the machine's whole GPUs; empty where there is none or NVML fails. MIG instances have no clocks of their own."""
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
    except Exception as error:  # a driver that breaks its own contract: what was read so far counts
        read = {state.index for state in found}
        found += [State(index, note=f"NVML failed: {error}") for index in wanted.values() if index not in read]
    return sorted(found, key=lambda state: state.index)


def _state(nvml: Any, handle: Any, index: int) -> State:
    def ask(call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(handle, *arguments)
        except nvml.NVMLError:  # not supported on this part or by this driver: unknown
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
        reasons=None if bits is None else tuple(word for bit, word in REASONS.items() if bits & bit),
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
    """Findings per GPU; one row for all."""
    seen = list(states)
    if not seen:
        return Check("clocks")
    findings = [finding for state in seen for finding in _findings(state, machine)]
    if any(state.persistent is False for state in seen):
        what = "persistence mode is off: the driver is loaded anew for every first process"
        findings.append(Finding(what, "sudo nvidia-smi -pm 1", "minor", "seconds at each start, not measured"))
    return Check("clocks", tuple(_rows(seen)), tuple(findings), {"gpus": [asdict(state) for state in seen]})


def _rows(states: list[State]) -> Iterator[str]:
    for state in states:
        if state.note:
            yield f"gpu {state.index}: {state.note}"
            continue
        held = UNKNOWN if state.reasons is None else ", ".join(state.reasons) or "nothing"
        heat = UNKNOWN if state.celsius is None else f"{state.celsius} C"
        ecc = UNKNOWN if state.ecc is None else "on" if state.ecc else "off"
        yield f"gpu {state.index}: {state.clock or UNKNOWN} of {state.most_clock or UNKNOWN} MHz, {heat}, held down by {held}; ECC {ecc}"


def _findings(state: State, machine: Machine) -> Iterator[Finding]:
    gpu, reasons = f"GPU {state.index}", state.reasons or ()
    look = f"nvidia-smi -i {state.index} -q -d PERFORMANCE,POWER,TEMPERATURE,CLOCK"
    costs = f"it ran at {state.clock} of {state.most_clock} MHz" if state.clock and state.most_clock else UNKNOWN
    if "heat (software)" in reasons or "heat (hardware)" in reasons:
        heat = f" at {state.celsius} C" if state.celsius is not None else ""
        yield Finding(
            f"{gpu} is slowed down by heat{heat}", f"clear the air flow; {look}", "costs", costs, "NVML, while it computed"
        )
    if "power brake" in reasons or "hardware slowdown" in reasons:
        yield Finding(
            f"{gpu} is braked by its power supply or hardware", f"check the power cables; {look}", "costs", costs, "NVML"
        )
    if "application clocks" in reasons and (state.clock or 0) < (state.most_clock or 0):
        mend = f"sudo nvidia-smi -i {state.index} -rac && sudo nvidia-smi -i {state.index} -rgc"
        yield Finding(f"{gpu} is held at clocks that somebody set", mend, "costs", costs, "NVML")
    if state.limit and state.usual_limit and state.limit < state.usual_limit - 1:
        what = f"{gpu} may draw {state.limit:.0f} W, usual are {state.usual_limit:.0f} W"
        yield Finding(
            what,
            f"sudo nvidia-smi -i {state.index} -pl {state.usual_limit:.0f}",
            "costs",
            costs if "power cap" in reasons else UNKNOWN,
        )
    if state.uncorrected:
        what = f"{gpu} counts {state.uncorrected} memory errors that ECC could not correct since the driver was loaded"
        mend = f"sudo nvidia-smi -i {state.index} -r; if they come back the card is broken"
        yield Finding(what, mend, "costs", "a run that stops or learns from wrong numbers")
    if state.link_width and state.most_link_width and state.link_width < state.most_link_width:
        what = f"{gpu} is connected by {state.link_width} of {state.most_link_width} PCIe lanes"
        lost = f"copies to and from the host at {state.link_width / state.most_link_width:.0%} of their rate"
        yield Finding(what, "put the card into a full slot, or reseat it", "costs", lost, "arithmetic")
    if state.used_bytes is not None and state.used_bytes > FOREIGN_BYTES:
        free = [other.index for other in machine.gpus if other.index != state.index]
        mend = f"nvidia-smi -i {state.index}" + (
            f"; or leave it out: CUDA_VISIBLE_DEVICES={','.join(map(str, free))}" if free else ""
        )
        yield Finding(
            f"other processes hold {bytes_in_words(state.used_bytes)} of {gpu}",
            mend,
            "costs",
            "that memory, and a share of the time",
        )
