"""What fused attention is called in a profiler's trace: the forward kernels of every implementation that a layer here can choose.

Names are as public sources give them; tests/traces/attention-kernels.json says which. Torch-free, so that layers may ask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gptoughts.planning.evidence import StepTrace


@dataclass(frozen=True)
class Mark:
    """A kernel is meant whose name, in lower case, holds all of `parts` and none of `without`."""

    parts: tuple[str, ...]
    without: tuple[str, ...] = ("bwd", "backward", "combine", "bprop")

    def meets(self, name: str) -> bool:
        """Whether a kernel of this name is one of those meant."""
        lower = name.lower()
        return all(part in lower for part in self.parts) and not any(part in lower for part in self.without)


FORWARD: Mapping[str, Mark] = {
    "flash": Mark(("pytorch_flash::flash_fwd",)),
    "efficient": Mark(("fmha_cutlassf",)),
    "cudnn": Mark(("cudnn", "sdpa", "fprop")),
    "flex": Mark(("triton_tem", "flex_attention")),
    "fa2": Mark(("flash_fwd", "kernel"), ("pytorch_flash", "combine", "cute", "bwd")),
    "fa3": Mark(("flash::flashattnfwdsm90",), ("pytorch_flash", "combine")),
    "fa4": Mark(("flash_attncute", "flash_fwd"), ("combine", "bwd")),
}
"""Implementation -> its forward kernel. `flash`, `efficient` and `cudnn` are torch's own, inside scaled_dot_product_attention."""


def attention_forwards(trace: StepTrace) -> dict[str, int]:
    """Implementation -> launches of its forward kernel in the watched step; only those that ran."""
    found = {kind: sum(count for name, count in trace.kernels.items() if mark.meets(name)) for kind, mark in FORWARD.items()}
    return {kind: count for kind, count in found.items() if count}


def told(found: Mapping[str, int]) -> str:
    """`6 efficient, 6 flash`, or `no fused attention`."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(found.items())) or "no fused attention"
