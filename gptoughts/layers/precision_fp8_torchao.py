"""Projections in FP8 through torchao, inside compiled blocks: half the bytes and twice the rate of bf16 matmuls.

Every projection in the blocks is converted; head, embedding, routers, experts and adapter weights stay in bf16, as do projections whose
widths are not divisible by 16, which are counted. Weights stay float32 under their own names; scales are recomputed in every step, so a
checkpoint holds nothing extra. Evaluation runs in bf16.

It depends on the compiler, which fuses the computation of scales with neighboring operators: without it the same step ran at 0.23 of its
speed (nanochat, dev/LOG.md, H100). Tensor-wise scaling with compiled blocks gained 17 % at width 1,664 (same source) and 25 % at 4,096
(torchao's documentation, 8 x H100) over compiled bf16; it was slower at 768. Row-wise scaling is more precise and ran at 0.85 to 1.10 up
to 8 B parameters. On a CPU the matmuls are emulated (quantized, then multiplied in float32): correct numerics, slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from gptoughts.errors import LayerError
from gptoughts.layers.support.requirements import capability, tokens_per_forward
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
    unproven,
    unsupported,
)
from gptoughts.planning.matmul_dtypes import SCALED, emulated_calls, fp8_launches, scaled_calls

NAME = "fp8-torchao"
MULTIPLE = 16
PAYING_WIDTH = 1536
PAYING_TOKENS = 4096
PAYING_ROWWISE_PARAMETERS = 9e9
GRADIENT = "c10::Float8_e5m2"  # tensor-wise: the dtype of gradients only, and each backward matmul has one as a factor


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """FP8 units, nn.Linear projections, matmuls large enough to gain, and a compiler."""
    spec = case.spec
    if spec.family is None:
        yield unsupported("needs a model of a known family, with known blocks")
        return
    if spec.projections not in (None, "linear"):
        yield unsupported(f"needs nn.Linear projections, {spec.family} uses {spec.projections}")
    if case.recipe.adapter.kind == "qlora":
        yield unsupported("projections of a 4-bit base cannot be quantized again")
    if case.on_gpu:
        yield from capability(case, (8, 9))
    if spec.width is not None and spec.width % MULTIPLE:
        yield unsupported(f"needs widths divisible by {MULTIPLE}, the model has {spec.width}")
    tokens = tokens_per_forward(case)
    odd = next((count for count in tokens if count % MULTIPLE), None)
    if odd:
        yield unsupported(f"needs tokens per forward divisible by {MULTIPLE}, found {odd}")
    if not case.on_gpu:
        yield slower("FP8 matmuls are emulated: this CPU has no FP8 unit", "torchao's Float8LinearConfig.emulate")
        return
    yield from _slowdowns(case, options, max(tokens, default=0))


def _slowdowns(case: Case, options: Options, tokens: int) -> Iterator[Reason]:
    spec = case.spec
    if "triton" not in case.machine.packages:
        yield slower("without triton nothing is compiled; uncompiled FP8 ran at 0.23 of its speed", "nanochat dev/LOG.md, H100")
    elif case.preferred.get("compile") == "eager":
        yield slower("uncompiled FP8 ran at 0.23 of its speed", "nanochat dev/LOG.md, H100")
    if spec.width is not None and spec.width < PAYING_WIDTH:
        yield slower(
            f"width {spec.width} is below {PAYING_WIDTH}, where FP8 was slower than compiled bf16",
            "nanochat dev/LOG.md, H100: 768 slower, 1,664 faster; LLMQ: 1,536 faster",
        )
    elif tokens and tokens < PAYING_TOKENS:
        yield slower(f"{tokens} tokens per forward are below {PAYING_TOKENS}: matmuls are too small", "torchao float8 roofline")
    # If the vocabulary is unknown, count the blocks only: 12 C^2 weights each.
    size = spec.parameters or 12 * (spec.depth or 0) * (spec.width or 0) ** 2
    if options["scaling"] == "rowwise" and 0 < size < PAYING_ROWWISE_PARAMETERS:
        yield slower(
            f"row-wise at {size / 1e9:.1f} B parameters ran at 0.85 to 0.90 of compiled bf16 up to 8 B",
            "torchtitan asyncTP_llama3_h100, nanochat dev/LOG.md",
        )


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Convert the projections in the blocks, and autocast the rest to bf16."""
    import torch

    from gptoughts.engine.optim.low_bit import quantize_projections, torchao_float8
    from gptoughts.models.kernels.fusion import projections

    torchao_float8()
    found = projections(engine.bare, engine.blocks)
    fitting, _ = found.split(MULTIPLE)
    if not fitting:
        raise LayerError(f"precision={NAME}: {engine.family.name} has no projection to convert ({left(found.left_out)})")

    def autocast() -> torch.autocast:
        return torch.autocast(engine.device.type, dtype=torch.bfloat16)

    with ExitStack() as stack:
        stack.callback(quantize_projections(engine.bare, fitting, options["scaling"], emulate=engine.device.type == "cpu"))
        for hook in ("forward_context", "eval_context"):
            stack.callback(engine.wrap_context(hook, autocast))
        yield


def left(counts) -> str:  # type: ignore[no-untyped-def]
    """Format the counts of modules that stay in bf16."""
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing else in the blocks"


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require every supported projection converted, and FP8 matmuls: one forward and two backward each, on a GPU by FP8 kernels."""
    from gptoughts.engine.optim.low_bit import is_quantized
    from gptoughts.models.kernels.fusion import projections

    found = projections(engine.bare, engine.blocks)
    fitting, odd = found.split(MULTIPLE)
    done = {name: module for name, module in fitting.items() if is_quantized(module)}
    on_gpu, rowwise = engine.device.type == "cuda", options["scaling"] == "rowwise"
    needed, needed_back = (count * trace.micro_batches for count in _least(engine, done))
    ran, back = (scaled_calls(trace) if on_gpu else emulated_calls(trace)), _of_the_backward(trace, on_gpu)
    text = f"{len(done)} of {len(fitting)} projections converted, {ran} {'' if on_gpu else 'emulated '}FP8 matmuls"
    text += (
        f", at least {needed} needed" if rowwise else f", {back} of them backward, at least {needed} and {needed_back} needed"
    )
    text += f"; in bf16: {left({'with unsupported widths': len(odd), **found.left_out})}"
    figures = {"converted": len(done), "projections": len(fitting), "products": ran, "expected": needed, "skipped": len(odd)}
    figures |= {} if rowwise else {"backward": back, "expected_backward": needed_back}
    short = ran < needed if rowwise else ran - back < needed - needed_back or back < needed_back
    if not done or len(done) < len(fitting):
        return inactive(text, **figures)
    if not on_gpu and trace.regions and short:
        return unproven(f"{text}; emulated matmuls in compiled regions cannot be counted", **figures)
    if short:
        return inactive(text, **figures)
    if rowwise and _runs_again(engine) and ran < needed + len(done) * trace.micro_batches:
        return unproven(f"{text}; row-wise, recomputed matmuls cannot be told from those of the backward", **figures)
    if not on_gpu:
        return active(text, **figures)
    kernels = fp8_launches(trace.kernels)
    figures["kernels"] = kernels
    if not trace.kernels:
        return unproven(f"{text}; the profiler saw no kernel", **figures)
    if kernels < max(needed, ran):
        return inactive(f"{text}, by {kernels} FP8 kernels", **figures)
    slow = "" if trace.regions else "; uncompiled FP8 ran at 0.23 of its speed (nanochat dev/LOG.md)"
    return active(f"{text}, by {kernels} FP8 kernels{slow}", **figures)


def _least(engine: Engine, done) -> tuple[int, int]:  # type: ignore[no-untyped-def]  # torch is not known here
    """Return the minimum number of FP8 matmuls per micro-batch, and of those in the backward.

    One each in the forward. Two in the backward if the weight is trained; if it is frozen, only the gradient of the input, which the
    first block's input may not need.
    """
    first = next(iter(engine.blocks), "")
    back = sum(2 if module.weight.requires_grad else not name.startswith(f"{first}.") for name, module in done.items())
    return len(done) + back, back


def _of_the_backward(trace: StepTrace, on_gpu: bool) -> int:
    """Count matmuls with a gradient as a factor; 0 for row-wise scaling, which uses one dtype for everything."""
    names = SCALED if on_gpu else ("aten::_to_copy",)  # emulation casts both factors back to float32 one at a time
    seen = [trace.operators[name].input_dtypes for name in names if name in trace.operators]
    return sum(calls for dtypes in seen for given, calls in dtypes.items() if GRADIENT in given[: 2 if on_gpu else 1])


def _runs_again(engine: Engine) -> bool:
    """Return whether a layer wraps a block's forward, as those of the recompute slot do."""
    return any("forward" in vars(block) for block in engine.blocks.values())


LAYER = Layer(
    name=NAME,
    slot="precision",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=lambda case, options, budget: budget.half(),  # FP8 weights are kept twice: as is and transposed
    unmet=unmet,
    packages=(("torchao", "lowbit"),),
    options={"scaling": Option("tensorwise", "one scale per tensor, or one per row", choices=("tensorwise", "rowwise"))},
    wraps=("forward_context", "eval_context"),
    changes_numerics=True,
    tolerance=(5e-2, 0.95),
    compute_dtype="bf16",
    repeatable_on_gpu=False,
)
