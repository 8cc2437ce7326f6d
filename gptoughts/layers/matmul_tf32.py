"""Float32 matmuls on tensor cores in TensorFloat-32: eight times the float32 rate on Ampere, with 10 bits of mantissa.

It changes every float32 matmul, and nothing where the precision slot already runs them in bf16. It hurts where float32 was chosen
for its digits. Source: NVIDIA A100 white paper; torch's notes on `torch.set_float32_matmul_precision`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gptoughts.layer import Case, Engine, Evidence, Layer, Options, Reason, Sight, active, cannot, inactive


def fits(case: Case, options: Options) -> Iterator[Reason]:
    """Units that multiply in TF32: GPUs from compute capability 8.0, CPUs with AMX-TF32."""
    least = case.machine.least_capability()
    if case.on_gpu and (least is None or least < (8, 0)):
        yield cannot(f"needs compute capability 8.0, found {f'{least[0]}.{least[1]}' if least else 'unknown'}")
    if not case.on_gpu and "amx_tf32" not in case.machine.cpu.instruction_sets:
        yield cannot(
            "needs a GPU of compute capability 8.0 or a CPU with AMX-TF32; torch takes the switch here and computes in float32"
        )


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Turn torch's switch, for CUDA and oneDNN alike."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def verify(engine: Engine, sight: Sight, options: Options) -> Evidence:
    """The switch alone proves nothing, so a product is computed whose exact value TF32 must round away.

    1 + 2^-12 needs 12 bits of mantissa; TF32 keeps 10, float32 23.
    """
    import torch

    left = torch.full((64, 64), 1.0 + 2.0**-12, device=engine.device)
    right = torch.eye(64, device=engine.device)
    error = float((left @ right - left).abs().max())
    if error > 0:
        return active(f"float32 matmul rounds 1 + 2^-12 by {error:.1e}", rounding=error)
    return inactive("float32 matmul keeps 1 + 2^-12 exactly, as plain float32 does", rounding=error)


LAYER = Layer(
    name="tf32",
    slot="matmul",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    fits=fits,
    changes_numerics=True,
)
