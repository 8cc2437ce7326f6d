"""GPUs through NVML, as a CUDA process would number them: the only file that imports pynvml (PyPI `nvidia-ml-py`).

NVML ignores CUDA_VISIBLE_DEVICES, so the selection is applied here. What cannot be read is None and a note; no box,
however strange, raises.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt

_ARCHITECTURES = {
    5: "maxwell",
    6: "pascal",
    8: "ampere",
    9: "hopper",
    10: "blackwell",
    11: "blackwell",
    12: "blackwell",
}


@dataclass(frozen=True)
class Gpu:
    """One device a CUDA process can take: a whole GPU or a MIG instance.

    `index` is the CUDA ordinal (after CUDA_VISIBLE_DEVICES), `power_limit_watts` the limit in force, `numa_node` the
    node nearest to the GPU; `links` has one word for each other visible GPU, in their order: `nvlink x18`, `pcie`,
    `none` (between MIG instances) or `unknown`.
    """

    index: NonNegativeInt
    name: str
    uuid: str = ""
    compute_capability: tuple[NonNegativeInt, NonNegativeInt] | None = None
    memory_bytes: NonNegativeInt | None = None
    power_limit_watts: Annotated[float, Field(ge=0, le=1e9)] | None = None
    mig: bool = False
    numa_node: NonNegativeInt | None = None
    links: tuple[str, ...] = ()
    free_bytes: NonNegativeInt | None = field(default=None, compare=False)
    """Free memory at the time of the probe; other processes may hold the rest."""

    @property
    def architecture(self) -> str | None:
        """`volta`, `turing`, `ampere`, `ada`, `hopper`, `blackwell`, ..., or None where the capability is unknown."""
        if self.compute_capability is None:
            return None
        major, minor = self.compute_capability
        if major == 7:
            return "turing" if minor >= 5 else "volta"
        return "ada" if (major, minor) == (8, 9) else _ARCHITECTURES.get(major)

    @property
    def capability_label(self) -> str:
        """`sm 9.0`, or `sm n/a`."""
        return "sm {}.{}".format(*self.compute_capability) if self.compute_capability else "sm n/a"


@dataclass(frozen=True)
class NvmlReading:
    """What NVML told: visible GPUs, the driver's version, the CUDA it carries, and what was not told and why."""

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: str | None = None
    notes: tuple[str, ...] = ()


@dataclass
class Device:
    """A GPU or MIG instance as NVML has it; `instances` is None where MIG is off."""

    uuid: str
    name: str
    handle: Any = None
    parent: Device | None = None
    instances: list[Device] | None = None
    switch_links: int = 0
    peer_links: Counter[str] = field(default_factory=Counter)
    links_known: bool = True
    bus_id: str = ""


def read_gpus(environment: Mapping[str, str], root: Path = Path("/")) -> NvmlReading:
    """The GPUs that a CUDA process with this environment would see; `root` is where /sys lies. Never raises."""
    notes: list[str] = []
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:  # a missing library, an old driver, a broken package: all mean no GPU here
        return NvmlReading(notes=(_why_none(error),))
    try:
        reader = _Reader(pynvml, notes, root)
        driver = reader.ask("driver version", pynvml.nvmlSystemGetDriverVersion)
        number = reader.ask("CUDA version of the driver", pynvml.nvmlSystemGetCudaDriverVersion_v2)
        cuda = f"{number // 1000}.{number % 1000 // 10}" if number else None
        devices = reader.devices()
        chosen, said = select(environment.get("CUDA_VISIBLE_DEVICES"), devices)
        notes += said + _order_notes(chosen, environment)
        gpus = tuple(reader.gpu(index, device, chosen) for index, device in enumerate(chosen))
        return NvmlReading(gpus, driver, cuda, tuple(notes))
    except Exception as error:  # a driver that breaks its own contract must not stop a run on the CPU
        return NvmlReading(notes=(*notes, f"NVML failed: {type(error).__name__}: {error}"))
    finally:
        with suppress(pynvml.NVMLError):  # everything that was asked for has been read
            pynvml.nvmlShutdown()


@contextmanager
def opened() -> Iterator[Any]:
    """NVML's own functions, started and shut down around the block, where `read_gpus` has found a GPU. Raises what pynvml raises."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        with suppress(pynvml.NVMLError):  # everything that was asked for has been read
            pynvml.nvmlShutdown()


def select(wanted: str | None, devices: list[Device]) -> tuple[list[Device], list[str]]:
    """Devices that CUDA_VISIBLE_DEVICES=`wanted` leaves, in its order, and notes on what it dropped.

    As CUDA and `torch.cuda.device_count` do it: the first entry that names no device ends the list, a repeated one
    empties it, an empty string or -1 is no device, and a UUID may be cut short while it stays unambiguous. A GPU in MIG
    mode stands for its instances.
    """
    notes = [f"{device.name} is in MIG mode without an instance" for device in devices if device.instances == []]
    if wanted is None:
        return _multiplied(devices, notes)
    taken: list[Device] = []
    entries = [entry.strip() for entry in wanted.split(",")]
    by_uuid = entries[0].startswith(("GPU-", "MIG-"))
    for entry in entries:
        device = _by_uuid(entry, entries[0][:4], devices) if by_uuid else _by_ordinal(entry, devices)
        if device is None:
            if entry not in ("", "-1"):
                notes.append(f"CUDA_VISIBLE_DEVICES={wanted}: {entry!r} names no GPU here, so CUDA stops reading there")
            break
        if any(device is other for other in taken):
            notes.append(f"CUDA_VISIBLE_DEVICES={wanted}: {entry!r} comes twice, so CUDA shows no GPU")
            taken = []
            break
        taken.append(device)
    if devices and not taken:
        notes.append(f"CUDA_VISIBLE_DEVICES={wanted!r} hides all {len(devices)} GPUs of this machine")
    return _multiplied(taken, notes)


def _multiplied(devices: list[Device], notes: list[str]) -> tuple[list[Device], list[str]]:
    """Devices with each GPU in MIG mode replaced by its instances."""
    found = [one for device in devices for one in ([device] if device.instances is None else device.instances)]
    if sum(one.parent is not None for one in found) > 1:
        notes.append("several MIG instances are visible: most drivers show a process only the first of them")
    return found, notes


def _by_ordinal(entry: str, devices: list[Device]) -> Device | None:
    """The device whose number `entry` starts with; CUDA reads as C's strtoul does, so `1x` is 1."""
    number = re.match(r"\+?\d+", entry)
    return devices[int(number[0])] if number and int(number[0]) < len(devices) else None


def _by_uuid(entry: str, kind: str, devices: list[Device]) -> Device | None:
    if not entry.startswith(kind) or entry == kind:
        return None
    pool = devices if kind == "GPU-" else [one for device in devices for one in device.instances or []]
    near = [device for device in pool if device.uuid.startswith(entry)]
    return near[0] if len(near) == 1 else None


def _order_notes(chosen: list[Device], environment: Mapping[str, str]) -> list[str]:
    """NVML counts in PCI order; CUDA's default puts the fastest first, which shows where GPUs differ."""
    boards = {(device.parent or device).name for device in chosen}
    if len(boards) < 2 or environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return []
    return ["the GPUs differ and CUDA_DEVICE_ORDER is not PCI_BUS_ID: CUDA may number them in another order, fastest first"]


def _why_none(error: Exception) -> str:
    kind = type(error).__name__
    known = {
        "NVMLError_LibraryNotFound": "no NVIDIA driver: libnvidia-ml.so.1 was not found",
        "NVMLError_DriverNotLoaded": "no GPU: the NVIDIA driver is installed but its kernel module is not loaded",
        "NVMLError_LibRmVersionMismatch": "no GPU: the NVIDIA driver and its library differ in version (driver/library"
        " mismatch); reboot, or reload the kernel module",
        "NVMLError_NoPermission": "no GPU: no permission to talk to the NVIDIA driver",
        "ModuleNotFoundError": "no GPU looked for: the package nvidia-ml-py is missing",
    }
    return known.get(kind, f"no GPU: NVML did not start ({kind}: {error})")


class _Reader:
    """Asks NVML one thing at a time and writes a note for each answer that did not come."""

    def __init__(self, nvml: Any, notes: list[str], root: Path) -> None:
        self.nvml, self.notes, self.root = nvml, notes, root

    def ask(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """The answer, or None and a note."""
        try:
            return call(*arguments)
        except (self.nvml.NVMLError, UnicodeError) as error:
            self.notes.append(f"{what}: not read ({error})")
            return None

    def devices(self) -> list[Device]:
        """Every GPU this process may open, in NVML's order, with links and MIG instances."""
        found = []
        for index in range(self.ask("number of GPUs", self.nvml.nvmlDeviceGetCount) or 0):
            handle = self.ask(f"GPU {index}", self.nvml.nvmlDeviceGetHandleByIndex, index)
            if handle is None:
                continue
            device = self._device(f"GPU {index}", handle)
            device.bus_id = self._bus_id(f"GPU {index}", handle)
            device.instances = self._instances(device)
            self._count_links(device)
            found.append(device)
        return found

    def _device(self, what: str, handle: Any) -> Device:
        name = self.ask(f"{what} name", self.nvml.nvmlDeviceGetName, handle)
        return Device(self.ask(f"{what} UUID", self.nvml.nvmlDeviceGetUUID, handle) or "", name or "unknown GPU", handle)

    def _bus_id(self, what: str, handle: Any) -> str:
        info = self.ask(f"{what} PCI address", self.nvml.nvmlDeviceGetPciInfo, handle)
        return _plain_bus_id(info.busId) if info else ""

    def _instances(self, device: Device) -> list[Device] | None:
        """MIG instances, or None where MIG is off or this GPU has none (then NVML says not supported)."""
        try:
            if self.nvml.nvmlDeviceGetMigMode(device.handle)[0] != self.nvml.NVML_DEVICE_MIG_ENABLE:
                return None
        except self.nvml.NVMLError:
            return None
        found = []
        for slot in range(
            self.ask(f"{device.name} MIG instances", self.nvml.nvmlDeviceGetMaxMigDeviceCount, device.handle) or 0
        ):
            try:
                handle = self.nvml.nvmlDeviceGetMigDeviceHandleByIndex(device.handle, slot)
            except self.nvml.NVMLError:  # a free slot; slots need not be filled in order
                continue
            instance = self._device(f"{device.name} MIG {slot}", handle)
            instance.parent = device
            found.append(instance)
        return found

    def _count_links(self, device: Device) -> None:
        """Active NVLinks by what is at their other end: a GPU's PCI address or a switch."""
        nvml = self.nvml
        for link in range(nvml.NVML_NVLINK_MAX_LINKS):
            try:
                active = nvml.nvmlDeviceGetNvLinkState(device.handle, link)
            except nvml.NVMLError:  # no NVLink on this part, or past its last link
                return
            if not active:
                continue
            try:
                kind = nvml.nvmlDeviceGetNvLinkRemoteDeviceType(device.handle, link)
                if kind == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
                    device.switch_links += 1
                elif kind == nvml.NVML_NVLINK_DEVICE_TYPE_GPU:
                    remote = nvml.nvmlDeviceGetNvLinkRemotePciInfo(device.handle, link)
                    device.peer_links[_plain_bus_id(remote.busId)] += 1
            except nvml.NVMLError as error:
                device.links_known = False
                self.notes.append(f"{device.name} ({device.bus_id}) NVLink {link}: its other end was not read ({error})")
                return

    def gpu(self, index: int, device: Device, visible: list[Device]) -> Gpu:
        """What is printed and planned with; a MIG instance has its own memory and its board's capability."""
        what = f"GPU {index} ({device.name})"
        board = device.parent or device
        memory = self.ask(f"{what} memory", self.nvml.nvmlDeviceGetMemoryInfo, device.handle)
        watts = None
        if device.parent is None:
            watts = self.ask(f"{what} power limit", self.nvml.nvmlDeviceGetEnforcedPowerLimit, device.handle)
        capability = self.ask(f"{what} compute capability", self.nvml.nvmlDeviceGetCudaComputeCapability, board.handle)
        return Gpu(
            index=index,
            name=device.name,
            uuid=device.uuid,
            compute_capability=tuple(capability) if capability else None,
            memory_bytes=int(memory.total) if memory else None,
            power_limit_watts=watts / 1000 if watts else None,
            mig=device.parent is not None,
            numa_node=self._numa_node(board),
            links=tuple(_link(device, other) for other in visible if other is not device),
            free_bytes=int(memory.free) if memory else None,
        )

    def _numa_node(self, board: Device) -> int | None:
        """The node nearest to the GPU from sysfs, where -1 is unknown; NVML's own call tells the node of GPU memory."""
        try:
            node = int((self.root / "sys/bus/pci/devices" / board.bus_id / "numa_node").read_text())
        except (OSError, ValueError):
            return None
        return node if node >= 0 else None


def _plain_bus_id(bus_id: bytes | str) -> str:
    """NVML's `00000000:3B:00.0` as sysfs writes it: `0000:3b:00.0`."""
    text = (bus_id.decode("ascii", "replace") if isinstance(bus_id, bytes) else bus_id).lower()
    domain, _, rest = text.partition(":")
    return f"{domain[-4:]}:{rest}"


def _link(one: Device, other: Device) -> str:
    """How two visible devices reach each other."""
    if one.parent or other.parent:
        return "none"
    if not (one.links_known and other.links_known):
        return "unknown"
    count = one.peer_links[other.bus_id] or min(one.switch_links, other.switch_links)
    return f"nvlink x{count}" if count else "pcie"
