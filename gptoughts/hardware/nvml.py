"""GPU probe through NVML, in CUDA's device order. The only file that imports pynvml (PyPI `nvidia-ml-py`).

NVML ignores CUDA_VISIBLE_DEVICES, so `select` applies it. A failed read gives None and a note, never an exception.
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
    """A CUDA device: a whole GPU or a MIG instance.

    `index` is the CUDA ordinal (after CUDA_VISIBLE_DEVICES), `power_limit_watts` the enforced limit, `numa_node` the
    NUMA node closest to the GPU; `links` has one entry per other visible GPU, in order: `nvlink x18`, `pcie`,
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
        """Return `volta`, `turing`, `ampere`, `ada`, `hopper`, `blackwell`, ...; None if the capability is unknown."""
        if self.compute_capability is None:
            return None
        major, minor = self.compute_capability
        if major == 7:
            return "turing" if minor >= 5 else "volta"
        return "ada" if (major, minor) == (8, 9) else _ARCHITECTURES.get(major)

    @property
    def capability_label(self) -> str:
        """Return `sm 9.0`, or `sm n/a`."""
        return "sm {}.{}".format(*self.compute_capability) if self.compute_capability else "sm n/a"


@dataclass(frozen=True)
class NvmlReading:
    """Visible GPUs, driver version, highest CUDA version of the driver, and notes on failed reads."""

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: str | None = None
    notes: tuple[str, ...] = ()


@dataclass
class Device:
    """A GPU or MIG instance of NVML; `instances` is None if MIG is off."""

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
    """Return the GPUs visible to a CUDA process with this environment; `root` contains /sys. Never raises."""
    notes: list[str] = []
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:  # missing library, old driver or broken package: no usable GPU
        return NvmlReading(notes=(_why_none(error),))
    try:
        reader = _Reader(pynvml, notes, root)
        driver = reader.ask("driver version", pynvml.nvmlSystemGetDriverVersion)
        number = reader.ask("CUDA version of the driver", pynvml.nvmlSystemGetCudaDriverVersion_v2)
        cuda = f"{number // 1000}.{number % 1000 // 10}" if number else None
        devices = reader.devices()
        chosen, select_notes = select(environment.get("CUDA_VISIBLE_DEVICES"), devices)
        notes += select_notes + _order_notes(chosen, environment)
        gpus = tuple(reader.gpu(index, device, chosen) for index, device in enumerate(chosen))
        return NvmlReading(gpus, driver, cuda, tuple(notes))
    except Exception as error:  # a misbehaving driver must not stop a CPU run
        return NvmlReading(notes=(*notes, f"NVML failed: {type(error).__name__}: {error}"))
    finally:
        with suppress(pynvml.NVMLError):  # all reads are done
            pynvml.nvmlShutdown()


@contextmanager
def opened() -> Iterator[Any]:
    """Initialize NVML for the block and yield pynvml. Call it only if `read_gpus` found a GPU. Raises pynvml errors."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        with suppress(pynvml.NVMLError):  # all reads are done
            pynvml.nvmlShutdown()


def select(wanted: str | None, devices: list[Device]) -> tuple[list[Device], list[str]]:
    """Return the devices that CUDA_VISIBLE_DEVICES=`wanted` selects, in its order, and notes on ignored entries.

    As CUDA and `torch.cuda.device_count`: the first entry that matches no device ends the list, a repeated one empties it,
    an empty string or -1 matches no device, and an unambiguous prefix of a UUID is enough. A GPU in MIG mode is replaced
    by its instances.
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
                notes.append(f"CUDA_VISIBLE_DEVICES={wanted}: no GPU {entry!r}; CUDA ignores it and all later entries")
            break
        if any(device is other for other in taken):
            notes.append(f"CUDA_VISIBLE_DEVICES={wanted}: {entry!r} is repeated; CUDA shows no GPU")
            taken = []
            break
        taken.append(device)
    if devices and not taken:
        notes.append(f"CUDA_VISIBLE_DEVICES={wanted!r} hides all {len(devices)} GPUs of this machine")
    return _multiplied(taken, notes)


def _multiplied(devices: list[Device], notes: list[str]) -> tuple[list[Device], list[str]]:
    """Return the devices with each GPU in MIG mode replaced by its instances."""
    found = [one for device in devices for one in ([device] if device.instances is None else device.instances)]
    if sum(one.parent is not None for one in found) > 1:
        notes.append("several MIG instances are visible: most drivers expose only the first to a process")
    return found, notes


def _by_ordinal(entry: str, devices: list[Device]) -> Device | None:
    """Return the device of the number at the start of `entry`; CUDA parses with strtoul, so `1x` is 1."""
    number = re.match(r"\+?\d+", entry)
    return devices[int(number[0])] if number and int(number[0]) < len(devices) else None


def _by_uuid(entry: str, kind: str, devices: list[Device]) -> Device | None:
    if not entry.startswith(kind) or entry == kind:
        return None
    pool = devices if kind == "GPU-" else [one for device in devices for one in device.instances or []]
    near = [device for device in pool if device.uuid.startswith(entry)]
    return near[0] if len(near) == 1 else None


def _order_notes(chosen: list[Device], environment: Mapping[str, str]) -> list[str]:
    """Return a note if NVML (PCI order) and CUDA (fastest first by default) may number different GPUs differently."""
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
        "NVMLError_NoPermission": "no GPU: no permission to access the NVIDIA driver",
        "ModuleNotFoundError": "no GPU probe: the package nvidia-ml-py is missing",
    }
    return known.get(kind, f"no GPU: NVML failed to initialize ({kind}: {error})")


class _Reader:
    """NVML queries that record a note for each failure."""

    def __init__(self, nvml: Any, notes: list[str], root: Path) -> None:
        self.nvml, self.notes, self.root = nvml, notes, root

    def ask(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result of `call`, or None after recording a note."""
        try:
            return call(*arguments)
        except (self.nvml.NVMLError, UnicodeError) as error:
            self.notes.append(f"{what}: not read ({error})")
            return None

    def devices(self) -> list[Device]:
        """Return every accessible GPU in NVML order, with links and MIG instances."""
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
        """Return the MIG instances; None if MIG is off or not supported."""
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
            except self.nvml.NVMLError:  # an empty slot; slots need not be filled in order
                continue
            instance = self._device(f"{device.name} MIG {slot}", handle)
            instance.parent = device
            found.append(instance)
        return found

    def _count_links(self, device: Device) -> None:
        """Count active NVLinks by remote end: a switch, or the PCI address of a GPU."""
        nvml = self.nvml
        for link in range(nvml.NVML_NVLINK_MAX_LINKS):
            try:
                active = nvml.nvmlDeviceGetNvLinkState(device.handle, link)
            except nvml.NVMLError:  # no NVLink, or past the last link
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
                self.notes.append(f"{device.name} ({device.bus_id}) NVLink {link}: remote end not read ({error})")
                return

    def gpu(self, index: int, device: Device, visible: list[Device]) -> Gpu:
        """Return the record of one device; a MIG instance has its own memory and the compute capability of its board."""
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
        """Return the closest NUMA node from sysfs (-1: unknown). NVML's own call returns the node of GPU memory instead."""
        try:
            node = int((self.root / "sys/bus/pci/devices" / board.bus_id / "numa_node").read_text())
        except (OSError, ValueError):
            return None
        return node if node >= 0 else None


def _plain_bus_id(bus_id: bytes | str) -> str:
    """Convert a PCI address from NVML's form to that of sysfs: `00000000:3B:00.0` -> `0000:3b:00.0`."""
    text = (bus_id.decode("ascii", "replace") if isinstance(bus_id, bytes) else bus_id).lower()
    domain, _, rest = text.partition(":")
    return f"{domain[-4:]}:{rest}"


def _link(one: Device, other: Device) -> str:
    """Return the link between two visible devices."""
    if one.parent or other.parent:
        return "none"
    if not (one.links_known and other.links_known):
        return "unknown"
    count = one.peer_links[other.bus_id] or min(one.switch_links, other.switch_links)
    return f"nvlink x{count}" if count else "pcie"
