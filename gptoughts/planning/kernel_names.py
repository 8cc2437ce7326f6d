"""Names of fused attention kernels in a profiler trace: the forward kernel of every implementation that a layer can choose.

Sources of the names: tests/traces/attention-kernels.json. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gptoughts.planning.evidence import StepTrace


@dataclass(frozen=True)
class KernelPattern:
    """Matches kernels whose lower-case name contains all of `parts` and none of `without`."""

    parts: tuple[str, ...]
    without: tuple[str, ...] = ("bwd", "backward", "combine", "bprop")

    def matches(self, name: str) -> bool:
        """Return whether `name` matches."""
        lower = name.lower()
        return all(part in lower for part in self.parts) and not any(part in lower for part in self.without)


FORWARD: Mapping[str, KernelPattern] = {
    "flash": KernelPattern(("pytorch_flash::flash_fwd",)),
    "efficient": KernelPattern(("fmha_cutlassf",)),
    "cudnn": KernelPattern(("cudnn", "sdpa", "fprop")),
    "flex": KernelPattern(("triton_tem", "flex_attention")),
    "fa2": KernelPattern(("flash_fwd", "kernel"), ("pytorch_flash", "combine", "cute", "bwd")),
    "fa3": KernelPattern(("flash::flashattnfwdsm90",), ("pytorch_flash", "combine")),
    "fa4": KernelPattern(("flash_attncute", "flash_fwd"), ("combine", "bwd")),
}
"""Implementation -> forward kernel. `flash`, `efficient` and `cudnn` are the backends of scaled_dot_product_attention."""


def attention_forwards(trace: StepTrace) -> dict[str, int]:
    """Return launches of forward kernels in the watched step, by implementation; only those that ran."""
    launches = {
        kind: sum(count for name, count in trace.kernels.items() if pattern.matches(name)) for kind, pattern in FORWARD.items()
    }
    return {kind: count for kind, count in launches.items() if count}


def format_launches(found: Mapping[str, int]) -> str:
    """Format launches: `6 efficient, 6 flash`, or `no fused attention`."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(found.items())) or "no fused attention"
