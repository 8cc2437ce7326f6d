"""RMSNorm, rotary positions and SwiGLU as one Triton kernel each: fewer launches, and intermediates that are never written.

It is for eager blocks: there each of the three is a chain of small operators. Beside compiled blocks it hurts or gives nothing, because
the compiler fuses the same chains with their neighbors, and a kernel from outside ends the fusion. Only modules that compute exactly
what the kernels compute are taken over, native ones and those of transformers (Llama, Mistral, Qwen, DeepSeek's norms and MLPs); the
others are counted and named. Nothing of another library is rebound. Sources: Hsu et al. 2024, Liger Kernel (arXiv:2410.10989);
pytorch/pytorch#141916, where compiled RMSNorm takes 0.0360 ms and Liger's 0.0356 at 2048 x 4096.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

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
"""Part -> what its Triton kernels are called (liger_kernel/ops); rotary positions have one name for both directions."""
LAUNCHES = {"norm": 1, "rope": 2, "mlp": 2}
"""Launches of those per place and micro-batch."""
CHOICES = ("all", "norm", "rope", "mlp", "norm,rope", "norm,mlp", "rope,mlp")
INTERPRETER = "TRITON_INTERPRET"


def chosen(options: Options) -> tuple[Any, ...]:
    """The parts that `options` name."""
    return tuple(KERNELS) if options["parts"] == "all" else tuple(options["parts"].split(","))


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """Triton on a GPU, a family that has what the kernels compute, and blocks that nothing else fuses."""
    spec = case.spec
    if spec.family is None:
        yield unsupported("needs a model of a known family; nothing is known of the modules of your own")
        return
    if case.on_gpu and "triton" not in case.machine.packages:
        yield unsupported("needs the package triton, not installed", remedy="pip install triton")
    if not case.on_gpu:
        if case.environment.get(INTERPRETER) != "1":
            yield unsupported("needs an NVIDIA GPU, found none (Triton's interpreter, for tests, has TRITON_INTERPRET=1)")
            return
        if set(chosen(options)) != {"rope"}:
            yield unsupported("Triton's interpreter fails on Liger's RMSNorm and SwiGLU", remedy="--layer.kernels.parts rope")
    if spec.norm == "layernorm" and spec.mlp == "gelu":
        yield unsupported(f"{spec.family} has LayerNorm and GELU; the kernels are RMSNorm, rotary positions and SwiGLU")
    yield slower(
        "compiled blocks fuse the same operators with their neighbors; it is for --layer.compile eager",
        "pytorch/pytorch#141916: RMSNorm compiled 0.0360 ms, Liger's 0.0356",
    )


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Send every place that computes what a kernel computes through that kernel."""
    from gptoughts.models.kernels import liger

    with ExitStack() as stack:
        for undo in liger.install(engine.bare, chosen(options)):
            stack.callback(undo)
        yield


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Every place holds a kernel, and each ran forward once per micro-batch: by name on a GPU, by torch's operator elsewhere."""
    from gptoughts.models.kernels import liger_places
    from gptoughts.models.kernels.liger import OPERATORS

    found, left = liger_places.places(engine.bare, chosen(options))
    on_gpu, short, told = engine.device.type == "cuda", [], []
    figures: dict[str, float] = {}
    for part, there, taken in liger_places.counted(found):
        once = taken * trace.micro_batches
        if on_gpu:
            ran, wanted, what = trace.launches(*KERNELS[part]), once * LAUNCHES[part], "kernels"
        else:
            ran = sum(trace.operators[name].calls for name in OPERATORS[part] if name in trace.operators)
            wanted, what = once, "operators"
        told.append(f"{part} {taken} of {there} places, {ran} {what}")
        figures |= {part: taken, f"{part}_ran": ran}
        short += [part] if taken < there or ran < wanted or not ran else []
    named = f"; left as they are: {len(left)} ({', '.join(left[:2])}{', ...' if len(left) > 2 else ''})" if left else ""
    text = ("; ".join(told) or "no place for a kernel") + named
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
    clashes={"fp8-te": "Transformer Engine's fused modules bring norm and SwiGLU of their own"},
    changes_numerics=True,
)
