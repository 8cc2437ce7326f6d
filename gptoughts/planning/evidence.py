"""What a watched step can show, and what it showed of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


@dataclass(frozen=True)
class Operator:
    """An operator of the watched step: how often it ran, and how often with which input dtypes."""

    name: str
    calls: int
    input_dtypes: Mapping[tuple[str, ...], int] = field(default_factory=dict)


@dataclass(frozen=True)
class StepTrace:
    """What the profiler and the engine's counters saw of one real training step."""

    operators: Mapping[str, Operator]
    kernels: Mapping[str, int]
    """CUDA kernels by name, with their launches; empty on a CPU."""
    regions: int
    """Calls of compiled regions."""
    micro_batches: int
    blocks: int
    updated: bool
    weights_moved: bool
    step_seconds: float
    data_wait_seconds: float
    memcpy_streams: int = 0
    """CUDA streams that copied from host to device and ran no kernel."""
    copies: Mapping[str, int] = field(default_factory=dict)
    """CUDA copies by direction: HtoD, DtoH, DtoD."""
    peak_bytes: int | None = None
    """Most memory that the process held on the device at one time during the step; None where nothing can tell."""
    recompiles: tuple[str, ...] = ()
    """Graphs that were compiled again since the run began, each with its cause."""
    call_counts: Mapping[str, int] = field(default_factory=dict)
    """Calls of what layers put in place, by the layer's name."""

    def calls(self, *fragments: str) -> int:
        """Calls of all operators whose name contains one of the fragments."""
        return sum(op.calls for op in self.operators.values() if any(part in op.name for part in fragments))

    def launches(self, *fragments: str) -> int:
        """Launches of all kernels whose name contains one of the fragments, in lower case."""
        return sum(count for name, count in self.kernels.items() if any(part in name.lower() for part in fragments))


class Status(StrEnum):
    """What a watched step showed of a layer."""

    ACTIVE = "active"
    INACTIVE = "inactive"
    UNPROVEN = "unproven"


@dataclass(frozen=True)
class Evidence:
    """What the watched step showed of one layer, in words and in figures."""

    status: Status
    text: str
    figures: Mapping[str, float] = field(default_factory=dict)


def active(text: str, **figures: float) -> Evidence:
    """The layer was seen at work."""
    return Evidence(Status.ACTIVE, text, figures)


def inactive(text: str, **figures: float) -> Evidence:
    """The layer was asked for and the step ran without it; the run stops."""
    return Evidence(Status.INACTIVE, text, figures)


def unproven(text: str, **figures: float) -> Evidence:
    """Nothing on this machine can tell; printed and recorded."""
    return Evidence(Status.UNPROVEN, text, figures)
