"""RMSNorm, rotary positions and SwiGLU as one Triton kernel each: fewer launches, and intermediates are not written to memory.

It is for eager blocks, where each of the three is a chain of small operators. With compiled blocks it gains nothing or hurts, because
the compiler fuses the same chains with their neighbors, and an external kernel breaks the fusion. Only modules that compute exactly
the same function are replaced, native ones and those of transformers (Llama, Mistral, Qwen, DeepSeek's norms and MLPs); the others are
counted and listed. No other library is monkey-patched. Sources: Hsu et al. 2024, Liger Kernel (arXiv:2410.10989);
pytorch/pytorch#141916, where compiled RMSNorm takes 0.0360 ms and Liger's 0.0356 at 2048 x 4096.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from gptoughts.layers.support.requirements import triton
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

KERNELS = {"norm": ("rms_norm_forward",), "rope": ("_triton_rope",), "mlp": ("_swiglu",)}
"""Part -> names of its Triton kernels (liger_kernel/ops); rotary positions have one name for both directions."""
LAUNCHES = {"norm": 1, "rope": 2, "mlp": 2}
"""Kernel launches per place and micro-batch."""
CHOICES = ("all", "norm", "rope", "mlp", "norm,rope", "norm,mlp", "rope,mlp")
INTERPRETER = "TRITON_INTERPRET"


def chosen(options: Options) -> tuple[Any, ...]:
    """Return the parts that `options` select."""
    return tuple(KERNELS) if options["parts"] == "all" else tuple(options["parts"].split(","))


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """Triton on a GPU, a family with matching modules, and blocks that are not compiled."""
    spec = case.spec
    if spec.family is None:
        yield unsupported("needs a model of a known family; the modules of a custom model are not known")
        return
    yield from triton(case)
    if not case.on_gpu:
        if case.environment.get(INTERPRETER) != "1":
            yield unsupported("needs an NVIDIA GPU, found none (for tests: Triton's interpreter, TRITON_INTERPRET=1)")
            return
        if set(chosen(options)) != {"rope"}:
            yield unsupported("Triton's interpreter fails on Liger's RMSNorm and SwiGLU", remedy="--layer.kernels.parts rope")
    if spec.norm == "layernorm" and spec.mlp == "gelu":
        yield unsupported(f"{spec.family} has LayerNorm and GELU; the kernels are RMSNorm, rotary positions and SwiGLU")
    yield slower(
        "compiled blocks fuse the same operators; use it with --layer.compile eager",
        "pytorch/pytorch#141916: RMSNorm compiled 0.0360 ms, Liger's 0.0356",
    )


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Replace every matching module's forward by its kernel."""
    from gptoughts.models.kernels import liger

    with ExitStack() as stack:
        for undo in liger.install(engine.bare, chosen(options)):
            stack.callback(undo)
        yield


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require a kernel in every place, run once per micro-batch: counted by kernel name on a GPU, by operator elsewhere."""
    from gptoughts.models.kernels import liger_places
    from gptoughts.models.kernels.liger import OPERATORS

    found, left = liger_places.places(engine.bare, chosen(options))
    on_gpu, short, counts = engine.device.type == "cuda", [], []
    figures: dict[str, float] = {}
    for part, there, taken in liger_places.counted(found):
        once = taken * trace.micro_batches
        if on_gpu:
            ran, wanted, what = trace.launches(*KERNELS[part]), once * LAUNCHES[part], "kernels"
        else:
            ran = sum(trace.operators[name].calls for name in OPERATORS[part] if name in trace.operators)
            wanted, what = once, "operators"
        counts.append(f"{part} {taken} of {there} places, {ran} {what}")
        figures |= {part: taken, f"{part}_ran": ran}
        short += [part] if taken < there or ran < wanted or not ran else []
    named = f"; not replaced: {len(left)} ({', '.join(left[:2])}{', ...' if len(left) > 2 else ''})" if left else ""
    text = ("; ".join(counts) or "no place for a kernel") + named
    return inactive(text, **figures) if short or not found else active(text, **figures)


LAYER = Layer(
    name="liger",
    slot="kernels",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    unmet=unmet,
    packages=(("liger-kernel", "liger"),),
    options={"parts": Option("all", "which kernels", choices=CHOICES)},
    clashes={"fp8-te": "Transformer Engine's fused modules include norm and SwiGLU"},
    changes_numerics=True,
)
