"""Float32 matmuls in reduced precision: TensorFloat-32 on a GPU, eight times the float32 rate on Ampere, with a 10-bit mantissa.

On a CPU with AMX-BF16 units `--layer.matmul.units bf16` makes oneDNN round both factors to bf16 (7 bits) and accumulate in float32. It
affects every float32 matmul, and none that the precision slot already runs in bf16. It hurts where float32 precision is needed, and on a
CPU that supports `precision = bf16`, which rounds the same and moves half the bytes.

`accumulate` sets whether cuBLAS may accumulate parts of a bf16 product in bf16. Torch's default allows it; this layer's does not.
Source: NVIDIA A100 white paper; torch's notes on `torch.set_float32_matmul_precision` and on reduced-precision reductions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gptoughts.layers.support.requirements import capability
from gptoughts.planning.layer import (
    Case,
    Engine,
    Evidence,
    Layer,
    Option,
    Options,
    Reason,
    StepTrace,
    active,
    inactive,
    slower,
    unsupported,
)

BF16_CPU = ("amx_bf16",)
"""Units that oneDNN rounds float32 factors for; with AVX512-BF16 alone (AMD EPYC, torch 2.13) a product stays float32."""
SWITCH = {"tf32": "high", "bf16": "medium"}
# 2^-k that the units must round away and float32 keeps; TF32 has 10 mantissa bits, bf16 7.
ROUNDED_AWAY = {"tf32": 12, "bf16": 9}
# 2^-k that bf16 rounds away and TF32 keeps, to tell the two apart.
KEPT_BY_TF32 = 9


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """TF32 units: GPUs from compute capability 8.0, CPUs with AMX-TF32. bf16 units for float32: CPUs only."""
    if case.on_gpu:
        yield from _on_a_gpu(case, options)
        return
    units = set(case.machine.cpu.instruction_sets)
    if options["units"] == "bf16":
        if not units & set(BF16_CPU):
            yield unsupported("needs a CPU with AMX-BF16; otherwise torch computes in float32")
        elif case.machine.has_older("torch", (2, 12)):  # seen with 2.11
            version = case.machine.packages["torch"]
            yield unsupported(
                f"torch {version} ignores the setting on a CPU and computes in float32",
                remedy="pip install -U 'torch>=2.13,<2.14'",
            )
        else:
            yield slower("precision=bf16 rounds the same and moves half the bytes", "torch's documentation of oneDNN")
    elif "amx_tf32" not in units:
        more = "--layer.matmul.units bf16" if units & set(BF16_CPU) else ""
        yield unsupported(
            "needs a GPU of compute capability 8.0 or a CPU with AMX-TF32; otherwise torch computes in float32",
            remedy=more,
        )
    if options["accumulate"] == "reduced":
        yield unsupported(
            "accumulate = reduced is a cuBLAS setting and needs a GPU", remedy="--layer.matmul.accumulate float32"
        )


def _on_a_gpu(case: Case, options: Options) -> Iterator[Reason]:
    yield from capability(case, (8, 0))
    if options["units"] == "bf16":
        yield unsupported("cuBLAS rounds float32 factors to TF32, not to bf16", remedy="--layer.precision bf16")


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Set torch's matmul flags for CUDA and oneDNN; restore each backend's flags on exit."""
    from gptoughts.layers.support.matmul_flags import float32_products, reduced_sums

    with float32_products(SWITCH[options["units"]]), reduced_sums("bf16", options["accumulate"] == "reduced"):
        yield


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Compute a product whose exact value the units must round; the flag alone is no proof.

    1 + 2^-12 needs a 12-bit mantissa; TF32 has 10, bf16 7, float32 23. Whether cuBLAS accumulates in bf16 depends on the shape, so for
    `accumulate` only the flag is checked.
    """
    from gptoughts.layers.support.matmul_flags import may_reduce

    units = options["units"]
    error, finer = rounding(engine, ROUNDED_AWAY[units]), rounding(engine, KEPT_BY_TF32)
    if error == 0:
        return inactive(f"float32 matmul keeps 1 + 2^-{ROUNDED_AWAY[units]} exactly, as float32 does", rounding=error)
    if units == "tf32" and finer > 0:
        return inactive(f"float32 matmul rounds 1 + 2^-{KEPT_BY_TF32}, which TF32 keeps", rounding=finer)
    text = f"float32 matmul rounds 1 + 2^-{ROUNDED_AWAY[units]} by {error:.1e}"
    if engine.device.type == "cuda":
        allowed = may_reduce("bf16")
        text += f", accumulation in bf16 is {'allowed' if allowed else 'disabled'}"
        if allowed is not (options["accumulate"] == "reduced"):
            return inactive(text, rounding=error)
    return active(text, rounding=error)


def rounding(engine: Engine, bits: int) -> float:
    """Return the rounding error of a float32 product with exact value 1 + 2^-bits."""
    import torch

    # 64 rows: oneDNN computes products of fewer than 32 in float32 regardless of the flag (seen with torch 2.13).
    left = torch.full((64, 64), 1.0 + 2.0**-bits, device=engine.device)
    right = torch.eye(64, device=engine.device)
    return float((left @ right - left).abs().max())


LAYER = Layer(
    name="tf32",
    slot="matmul",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    unmet=unmet,
    options={
        "units": Option("tf32", "format that float32 factors are rounded to", choices=tuple(SWITCH)),
        "accumulate": Option("float32", "precision for accumulating parts of a bf16 product", choices=("float32", "reduced")),
    },
    changes_numerics=True,
    tolerance=(1e-2, 0.999),
)
