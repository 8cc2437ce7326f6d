"""Trace of a watched step, and the evidence that a layer derives from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


@dataclass(frozen=True)
class Operator:
    """An operator of the watched step, with its calls in total and per tuple of input dtypes."""

    name: str
    calls: int
    input_dtypes: Mapping[tuple[str, ...], int] = field(default_factory=dict)


@dataclass(frozen=True)
class StepTrace:
    """Profiler events and engine counters of one real training step."""

    operators: Mapping[str, Operator]
    kernels: Mapping[str, int]
    """Launches per CUDA kernel name; empty on a CPU."""
    regions: int
    """Calls of compiled regions."""
    micro_batches: int
    blocks: int
    updated: bool
    weights_moved: bool
    step_seconds: float
    data_wait_seconds: float
    memcpy_streams: int = 0
    """CUDA streams with host-to-device copies and no kernels."""
    copies: Mapping[str, int] = field(default_factory=dict)
    """CUDA copies by direction: HtoD, DtoH, DtoD."""
    peak_bytes: int | None = None
    """Peak device memory of the process during the step; None if unknown."""
    recompiles: tuple[str, ...] = ()
    """Recompilations since the start of the run, each with its cause."""
    call_counts: Mapping[str, int] = field(default_factory=dict)
    """Calls of code that layers installed, by layer name."""
    attentions: int | None = None
    """Attention modules; None for one in each block."""

    @property
    def attention_forwards(self) -> int:
        """Forwards of attention modules in the step, at least; more where a model runs a module several times."""
        return (self.blocks if self.attentions is None else self.attentions) * self.micro_batches

    @property
    def attention_label(self) -> str:
        """Return `attention_forwards` in words."""
        what = "block" if self.attentions in (None, self.blocks) else "attention"
        return f"{self.attention_forwards} {what} forwards"

    def calls(self, *fragments: str) -> int:
        """Return the calls of all operators whose name contains one of the fragments."""
        return sum(op.calls for op in self.operators.values() if any(part in op.name for part in fragments))

    def launches(self, *fragments: str) -> int:
        """Return the launches of all kernels whose lower-case name contains one of the fragments."""
        return sum(count for name, count in self.kernels.items() if any(part in name.lower() for part in fragments))


class Status(StrEnum):
    """State of a layer in the watched step."""

    ACTIVE = "active"
    INACTIVE = "inactive"
    UNPROVEN = "unproven"


@dataclass(frozen=True)
class Evidence:
    """Result of the watched step for one layer, as text and numbers."""

    status: Status
    text: str
    figures: Mapping[str, float] = field(default_factory=dict)


def active(text: str, **figures: float) -> Evidence:
    """Return evidence that the layer was active."""
    return Evidence(Status.ACTIVE, text, figures)


def inactive(text: str, **figures: float) -> Evidence:
    """Return evidence that the step ran without the layer; the run stops."""
    return Evidence(Status.INACTIVE, text, figures)


def unproven(text: str, **figures: float) -> Evidence:
    """Return that this machine cannot show either; printed and recorded."""
    return Evidence(Status.UNPROVEN, text, figures)
