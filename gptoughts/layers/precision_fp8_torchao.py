"""Projections in 8-bit floating point through torchao, inside compiled blocks: half the bytes and twice the rate of bf16's products.

Every projection in the blocks is converted; head, embedding, routers, experts and the parts of an adapter stay in bf16, and so do widths
that 16 does not divide, which are counted. Weights keep float32, their names and their place; scales are found anew in every step, so a
checkpoint holds nothing more. Evaluation runs in bf16.

It lives from the compiler, which fuses the search for scales into what stands around: without it the same step ran at 0.23 of its speed
(nanochat, dev/LOG.md, H100). Tensor-wise with compiled blocks gained 17 % at a width of 1,664 (there) and 25 % at 4,096 (torchao's
documentation, 8 x H100) over compiled bf16; it lost at 768. Row-wise is more exact and at 8 B parameters and below ran at 0.85 to 1.10.
On a CPU the products are emulated: quantized, then multiplied in float32. That shows numerics and surgery, and is slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gptoughts.errors import LayerError
from gptoughts.planning.layer import (
    Budget,
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
from gptoughts.planning.matmul_dtypes import SCALED, emulated, fp8_launches, scaled

NAME = "fp8-torchao"
MULTIPLE = 16
PAYING_WIDTH = 1536
PAYING_TOKENS = 4096
PAYING_ROWWISE_PARAMETERS = 9e9
GRADIENT = (
    "c10::Float8_e5m2"  # tensor-wise, gradients alone are of this type, and each product of the backward has one as a factor
)


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """FP8 units, projections that are plain linear layers, products large enough to win, and a compiler."""
    spec, least = case.spec, case.machine.min_capability()
    if spec.family is None:
        yield unsupported("needs a model of a known family, whose blocks are known")
        return
    if spec.projections not in (None, "linear"):
        yield unsupported(f"needs nn.Linear projections, {spec.family} uses {spec.projections}")
    if case.recipe.adapter.kind == "qlora":
        yield unsupported("an adapter over a packed base leaves no projection that could be quantized again")
    if case.on_gpu and (least is None or least < (8, 9)):
        yield unsupported(f"needs compute capability 8.9, found {f'{least[0]}.{least[1]}' if least else 'unknown'}")
    if spec.width is not None and spec.width % MULTIPLE:
        yield unsupported(f"needs widths divisible by {MULTIPLE}, the model has {spec.width}")
    tokens = tokens_per_forward(case)
    odd = next((count for count in tokens if count % MULTIPLE), None)
    if odd:
        yield unsupported(f"needs a number of tokens per forward divisible by {MULTIPLE}, here {odd}")
    if not case.on_gpu:
        yield slower("products are emulated here: this CPU has no FP8 unit", "torchao's Float8LinearConfig.emulate")
        return
    yield from _losses(case, options, max(tokens, default=0))


def tokens_per_forward(case: Case) -> list[int]:
    """Tokens of a micro-batch, and of the smaller last one where there is one."""
    length, most = case.spec.sequence_length or 0, case.forward_sequences
    rest = case.rank_sequences % most if most else 0
    return [count * length for count in (most, rest) if count * length]


def _losses(case: Case, options: Options, tokens: int) -> Iterator[Reason]:
    spec = case.spec
    if "triton" not in case.machine.packages:
        yield slower("without triton nothing is compiled, and FP8 ran at 0.23 of its speed", "nanochat dev/LOG.md, H100")
    elif case.wishes.get("compile") == "eager":
        yield slower("without compilation FP8 ran at 0.23 of its speed", "nanochat dev/LOG.md, H100")
    if spec.width is not None and spec.width < PAYING_WIDTH:
        yield slower(
            f"width {spec.width} is below {PAYING_WIDTH}, where FP8 lost against compiled bf16",
            "nanochat dev/LOG.md, H100: 768 slower, 1,664 faster; LLMQ: 1,536 faster",
        )
    elif tokens and tokens < PAYING_TOKENS:
        yield slower(
            f"{tokens} tokens per forward are below {PAYING_TOKENS}: the products are too small", "torchao float8 roofline"
        )
    # Where the vocabulary is not known yet the blocks alone are counted: 12 C^2 weights each.
    size = spec.parameters or 12 * (spec.depth or 0) * (spec.width or 0) ** 2
    if options["scaling"] == "rowwise" and 0 < size < PAYING_ROWWISE_PARAMETERS:
        yield slower(
            f"row-wise at {size / 1e9:.1f} B parameters ran at 0.85 to 0.90 of compiled bf16 up to 8 B",
            "torchtitan asyncTP_llama3_h100, nanochat dev/LOG.md",
        )


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """As bf16: a weight in FP8 is kept twice, as it is and transposed."""
    return budget.half()


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Swap the projections in the blocks, and autocast what stands around them to bf16."""
    import torch

    from gptoughts.engine.optim.low_bit import quantize_projections, torchao_float8
    from gptoughts.models.kernels.fusion import projections

    torchao_float8()
    found = projections(engine.bare, engine.blocks)
    fitting, _ = found.split(MULTIPLE)
    if not fitting:
        raise LayerError(
            f"precision {NAME}: {engine.family.name} has no projection that could be converted ({left(found.left_out)})"
        )

    def autocast() -> torch.autocast:
        return torch.autocast(engine.device.type, dtype=torch.bfloat16)

    undo = [quantize_projections(engine.bare, fitting, options["scaling"], emulate=engine.device.type == "cpu")]
    undo += [engine.wrap_context(verb, autocast) for verb in ("forward_context", "eval_context")]
    try:
        yield
    finally:
        for back in undo:
            back()


def left(counts) -> str:  # type: ignore[no-untyped-def]
    """What stays in bf16, for a person."""
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing else in the blocks"


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Every projection that fits is converted, and 8-bit products ran, one forward and two backward, on a GPU by such kernels."""
    from gptoughts.engine.optim.low_bit import is_quantized
    from gptoughts.models.kernels.fusion import projections

    found = projections(engine.bare, engine.blocks)
    fitting, odd = found.split(MULTIPLE)
    done = {name: module for name, module in fitting.items() if is_quantized(module)}
    on_gpu, rowwise = engine.device.type == "cuda", options["scaling"] == "rowwise"
    needed, needed_back = (count * trace.micro_batches for count in _least(engine, done))
    ran, back = (scaled(trace) if on_gpu else emulated(trace)), _of_the_backward(trace, on_gpu)
    text = f"{len(done)} of {len(fitting)} projections converted, {ran} {'' if on_gpu else 'emulated '}FP8 products"
    text += (
        f", at least {needed} needed" if rowwise else f", {back} of them backward, at least {needed} and {needed_back} needed"
    )
    text += f"; in bf16: {left({'of odd widths': len(odd), **found.left_out})}"
    figures = {"converted": len(done), "projections": len(fitting), "products": ran, "expected": needed, "skipped": len(odd)}
    figures |= {} if rowwise else {"backward": back, "expected_backward": needed_back}
    short = ran < needed if rowwise else ran - back < needed - needed_back or back < needed_back
    if not done or len(done) < len(fitting):
        return inactive(text, **figures)
    if not on_gpu and trace.regions and short:
        return unproven(f"{text}; emulated products inside compiled regions leave no operator to count", **figures)
    if short:
        return inactive(text, **figures)
    if rowwise and _runs_again(engine) and ran < needed + len(done) * trace.micro_batches:
        return unproven(f"{text}; row-wise, products that run again look like those of the backward", **figures)
    if not on_gpu:
        return active(text, **figures)
    kernels = fp8_launches(trace.kernels)
    figures["kernels"] = kernels
    if not trace.kernels:
        return unproven(f"{text}; the profiler saw no kernel at all", **figures)
    if kernels < max(needed, ran):
        return inactive(f"{text}, by {kernels} FP8 kernels", **figures)
    slow = "" if trace.regions else "; not compiled, where FP8 ran at 0.23 of its speed (nanochat dev/LOG.md)"
    return active(f"{text}, by {kernels} FP8 kernels{slow}", **figures)


def _least(engine: Engine, done) -> tuple[int, int]:  # type: ignore[no-untyped-def]  # torch is not known here
    """Products that a micro-batch takes at least, and those of its backward.

    Forward one each. Backward two where the weight is trained; where it is frozen the gradient of the input, which the first block's
    input may do without.
    """
    first = next(iter(engine.blocks), "")
    back = sum(2 if module.weight.requires_grad else not name.startswith(f"{first}.") for name, module in done.items())
    return len(done) + back, back


def _of_the_backward(trace: StepTrace, on_gpu: bool) -> int:
    """Products with a gradient as one factor; none where scaling is row-wise, which has one type for everything."""
    names = SCALED if on_gpu else ("aten::_to_copy",)  # emulated, both factors are brought back to float32 one by one
    seen = [trace.operators[name].input_dtypes for name in names if name in trace.operators]
    return sum(calls for dtypes in seen for given, calls in dtypes.items() if GRADIENT in given[: 2 if on_gpu else 1])


def _runs_again(engine: Engine) -> bool:
    """Whether a layer stands in front of a block's forward, as those of the recompute slot do."""
    return any("forward" in vars(block) for block in engine.blocks.values())


LAYER = Layer(
    name=NAME,
    slot="precision",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    packages=(("torchao", "lowbit"),),
    options={"scaling": Option("tensorwise", "one scale per tensor, or one per row", choices=("tensorwise", "rowwise"))},
    wraps=("forward_context", "eval_context"),
    changes_numerics=True,
    repeatable_on_gpu=False,
)
