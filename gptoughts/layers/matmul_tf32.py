"""Float32 matmuls on units of fewer digits: TensorFloat-32 on a GPU, eight times the float32 rate on Ampere, with 10 bits of mantissa.

On a CPU with bf16 units `--layer.matmul.units bf16` makes oneDNN round both factors to bf16, 7 bits, and add in float32. It changes every
float32 matmul, and nothing where the precision slot already runs them in bf16. It hurts where float32 was chosen for its digits, and on
a CPU wherever `precision = bf16` can be had, which rounds the same and moves half the bytes.

`accumulate` says whether cuBLAS may add up parts of a bf16 product in bf16. Torch allows that; here it is off unless asked for.
Source: NVIDIA A100 white paper; torch's notes on `torch.set_float32_matmul_precision` and on reduced-precision reductions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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

BF16_CPU = ("avx512_bf16", "amx_bf16")
SWITCH = {"tf32": "high", "bf16": "medium"}
# A mantissa of 2^-k that the units must round away and float32 keeps; TF32 holds 10 bits, bf16 7.
ROUNDED_AWAY = {"tf32": 12, "bf16": 9}
# And one that bf16 must round away while TF32 keeps it: which of the two rounded is part of the proof.
KEPT_BY_TF32 = 9


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """Units that multiply in TF32: GPUs from compute capability 8.0, CPUs with AMX-TF32. In bf16 for float32: CPUs only."""
    if case.on_gpu:
        yield from _on_a_gpu(case, options)
        return
    units = set(case.machine.cpu.instruction_sets)
    if options["units"] == "bf16":
        if not units & set(BF16_CPU):
            yield unsupported("needs a CPU with AVX512-BF16 or AMX-BF16; torch takes the switch here and computes in float32")
        elif case.machine.has_older("torch", (2, 12)):  # seen with 2.11
            version = case.machine.packages["torch"]
            yield unsupported(
                f"torch {version} takes the switch on a CPU and computes in float32",
                remedy="pip install -U 'torch>=2.13,<2.14'",
            )
        else:
            yield slower("precision=bf16 rounds the same and moves half the bytes", "torch's documentation of oneDNN")
    elif "amx_tf32" not in units:
        more = "--layer.matmul.units bf16" if units & set(BF16_CPU) else ""
        yield unsupported(
            "needs a GPU of compute capability 8.0 or a CPU with AMX-TF32; torch takes the switch here and computes in float32",
            remedy=more,
        )
    if options["accumulate"] == "reduced":
        yield unsupported(
            "accumulate = reduced is a switch of cuBLAS, and this is a CPU", remedy="--layer.matmul.accumulate float32"
        )


def _on_a_gpu(case: Case, options: Options) -> Iterator[Reason]:
    least = case.machine.min_capability()
    if least is None or least < (8, 0):
        yield unsupported(f"needs compute capability 8.0, found {f'{least[0]}.{least[1]}' if least else 'unknown'}")
    if options["units"] == "bf16":
        yield unsupported("cuBLAS rounds float32 factors to TF32 and to nothing less", remedy="--layer.precision bf16")


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Turn torch's switches, for CUDA and oneDNN alike; afterwards they stand as they were found, backend by backend."""
    from gptoughts.layers.support.matmul_flags import float32_products, reduced_sums

    with float32_products(SWITCH[options["units"]]), reduced_sums("bf16", options["accumulate"] == "reduced"):
        yield


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """The switch alone proves nothing, so a product is computed whose exact value the units must round away.

    1 + 2^-12 needs 12 bits of mantissa; TF32 keeps 10, bf16 7, float32 23. What cuBLAS adds up in bf16 depends on the shape, so of
    `accumulate` only the switch can be read.
    """
    from gptoughts.layers.support.matmul_flags import may_reduce

    units = options["units"]
    error, finer = rounding(engine, ROUNDED_AWAY[units]), rounding(engine, KEPT_BY_TF32)
    if error == 0:
        return inactive(f"float32 matmul keeps 1 + 2^-{ROUNDED_AWAY[units]} exactly, as plain float32 does", rounding=error)
    if units == "tf32" and finer > 0:
        return inactive(f"float32 matmul rounds 1 + 2^-{KEPT_BY_TF32}, which TF32 keeps", rounding=finer)
    text = f"float32 matmul rounds 1 + 2^-{ROUNDED_AWAY[units]} by {error:.1e}"
    if engine.device.type == "cuda":
        allowed = may_reduce("bf16")
        text += f", adding in bf16 is {'allowed' if allowed else 'forbidden'}"
        if allowed is not (options["accumulate"] == "reduced"):
            return inactive(text, rounding=error)
    return active(text, rounding=error)


def rounding(engine: Engine, bits: int) -> float:
    """By how much a float32 product with ones misses 1 + 2^-bits."""
    import torch

    # 64 rows: oneDNN keeps products of less than 32 in float32 whatever the switch says (seen with torch 2.13).
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
        "units": Option("tf32", "what float32 factors are rounded to", choices=tuple(SWITCH)),
        "accumulate": Option("float32", "what parts of a bf16 product are added in", choices=("float32", "reduced")),
    },
    changes_numerics=True,
)
