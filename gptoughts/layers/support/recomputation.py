"""FLOPs of recomputed blocks."""

from __future__ import annotations

from gptoughts.config.model_spec import ModelSpec


def until_last_projection(spec: ModelSpec) -> float:
    """Return the share of a block's forward matmuls that a recomputation runs: torch stops it before the block's last projection.

    Nothing in the backward needs that one's output. With experts the last projection is not one matmul, and all count.
    """
    width, hidden, heads = spec.width, spec.hidden, spec.heads
    if width is None or hidden is None or heads is None or spec.experts:
        return 1.0
    queries = spec.attention_width or width
    keys = queries * (spec.kv_heads or heads) // heads
    last = hidden * width
    return 1 - last / (width * (2 * queries + 2 * keys) + (3 if spec.mlp == "swiglu" else 2) * last)
