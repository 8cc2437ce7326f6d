"""Precision of matrix products and convolutions in a watched step, by operator dtypes and by kernel names.

FP8 kernel names are those in public profiles of Ada, Hopper and Blackwell (docs/decisions.md); tests/traces holds one of each kind.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from gptoughts.planning.evidence import StepTrace

FACTORS = {
    "aten::mm": slice(0, 2),
    "aten::bmm": slice(0, 2),
    "aten::convolution": slice(0, 2),
    "aten::addmm": slice(1, 3),
    "aten::addmm_": slice(1, 3),
    "aten::_addmm_activation": slice(1, 3),
    "aten::baddbmm": slice(1, 3),
    "aten::baddbmm_": slice(1, 3),
    "aten::_grouped_mm": slice(0, 2),
}
"""Positions of the two factors among the arguments; the others are sums, outputs and scalars."""

SCALED = ("aten::_scaled_mm", "aten::_scaled_mm_v2")
"""Torch's matrix products of scaled 8-bit factors."""

FLOAT8 = "c10::Float8"

# cuBLAS's own kernels: the first two letters after the optional architecture are the factors' types, q for E4M3 (t is bf16, h fp16, s fp32).
# No public profile shows the letter of E5M2, so anything but the known wide types beside a q counts as 8-bit.
_NVJET = re.compile(r"^(?:void )?nvjet_(?:sm\d+[a-z]?_)?([a-z])([a-z])")
_WIDE = frozenset("thsdc")
_EIGHT_BITS = re.compile(r"e4m3|e5m2|float8|fp8|f8f8")
_TEMPLATE = re.compile(r"^triton_(?:tem|mm)_.*scaled_mm")
# Transformer Engine kernels with the same types in their arguments that do not multiply.
_AROUND = ("transformer_engine::", "nvte_", "transpose_kernel", "quantize", "amax", "swizzle")


def count_by_dtype(trace: StepTrace, low: str, full: str = "float") -> tuple[int, int]:
    """Return (products with all factors in `low`, products with any factor in `full`). Dtype names are those of the profiler."""
    counted: Counter[str] = Counter()
    for name, place in FACTORS.items():
        operator = trace.operators.get(name)
        for given, calls in operator.input_dtypes.items() if operator else ():
            factors = given[place]
            counted["low"] += calls * all(dtype == low for dtype in factors)
            counted["full"] += calls * any(dtype == full for dtype in factors)
    return counted["low"], counted["full"]


def scaled_calls(trace: StepTrace) -> int:
    """Return the calls of torch's scaled matrix products with two 8-bit factors."""
    return sum(
        calls
        for name in SCALED
        if name in trace.operators
        for given, calls in trace.operators[name].input_dtypes.items()
        if len(given) > 1 and all(dtype.startswith(FLOAT8) for dtype in given[:2])
    )


def emulated_calls(trace: StepTrace) -> int:
    """Return the products that were emulated: both 8-bit factors are converted to float32 and multiplied."""
    operator = trace.operators.get("aten::_to_copy")
    widened = sum(calls for given, calls in operator.input_dtypes.items() if given[0].startswith(FLOAT8)) if operator else 0
    return widened // 2


def is_fp8_kernel(name: str) -> bool:
    """Return whether a CUDA kernel multiplies 8-bit matrices; casts, transposes and norms of these types do not count."""
    low = name.lower()
    jet = _NVJET.match(low)
    if jet:
        factors = {jet[1], jet[2]}
        return "q" in factors and not factors & _WIDE
    if _TEMPLATE.match(low):
        return True
    if "gemm" not in low and "matmul" not in low:
        return False
    return bool(_EIGHT_BITS.search(low)) and not any(part in low for part in _AROUND)


def fp8_launches(kernels: Mapping[str, int]) -> int:
    """Return the launches of kernels that multiply 8-bit matrices."""
    return sum(count for name, count in kernels.items() if is_fp8_kernel(name))
