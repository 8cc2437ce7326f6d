"""Projections in FP8 through Transformer Engine, with norm and MLP fused around them.

Each block of a native model uses the largest matching modules: norm + qkv, attention output, norm + MLP. Models of transformers use one
module per projection. Parameters stay float32 under their own names; embedding, head, attention, routers and experts stay in bf16, and
evaluation runs in bf16. Projections whose widths the scaling does not support are not converted, and are counted.

It hurts narrow models and few tokens per forward, where quantization costs more than the matmuls save, and it excludes compilation:
Transformer Engine disables Dynamo for its modules (`no_torch_dynamo` on `forward` of Linear, LayerNormLinear and LayerNormMLP, 2.4 to
2.20), so the rest of the blocks runs eagerly as well. Published gains are over eager bf16: 1.10 to 1.15 at 1 to 3 B parameters (MosaicML
llm-foundry, H100), 1.55 at 7 B with the fusion (TE's Llama tutorial), of which 1.16 is FP8 itself.

Scalings: `delayed` from a history of maxima, saved in checkpoints; `current` from the tensor itself; `blockwise` (128 values, from
compute capability 9.0 with CUDA 12.9); `mxfp8` (32 values, 10.x).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from gptoughts.errors import LayerError
from gptoughts.layers.support.requirements import tokens_per_forward
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
from gptoughts.planning.matmul_dtypes import fp8_launches

NAME = "fp8-te"
# Below this the gain over eager bf16 is at most 1.15, which compiled bf16 blocks reach without FP8.
PAYING_WIDTH = 4096
PAYING_TOKENS = 4096
SCALINGS = {
    "delayed": "DelayedScaling",
    "current": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
# Multiples that cuBLAS requires for every dimension of an FP8 matmul, and block sizes of scales
# (TE: assert_dim_for_fp8_exec, is_quantizable).
MULTIPLES = {"delayed": 16, "current": 16, "blockwise": 128, "mxfp8": 32}
CAPABILITIES = {"blockwise": ((9, 0), (12, 0)), "mxfp8": ((10, 0), (12, 0))}
PRODUCTS = 2  # FP8 kernels required per projection and step: the forward, and at least one of two in the backward
OPAQUE = "Transformer Engine disables Dynamo for its modules, and fullgraph=True is used (TE 2.20 module/linear.py)"


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """FP8 units, nn.Linear projections, and matmuls large enough to gain."""
    spec, multiple = case.spec, MULTIPLES[options["scaling"]]
    if spec.family is None:
        yield unsupported("needs a model of a known family, with known projections")
        return
    if case.recipe.adapter.kind != "none":
        yield unsupported("frozen projections of an adapter are not converted", remedy="--layer.precision fp8-torchao or bf16")
        return
    if spec.projections not in (None, "linear"):
        yield unsupported(f"needs nn.Linear projections, {spec.family} uses {spec.projections}")
    yield from _units(case, options["scaling"])
    if spec.width is not None and spec.width % multiple:
        yield unsupported(f"needs widths divisible by {multiple}, the model has {spec.width}")
    tokens = tokens_per_forward(case)
    odd = next((count for count in tokens if count % multiple), None)
    if odd:
        yield unsupported(f"needs tokens per forward divisible by {multiple}, found {odd}")
    if spec.width is not None and spec.width < PAYING_WIDTH:
        yield slower(
            f"width {spec.width} is below {PAYING_WIDTH}, where uncompiled FP8 was slower than compiled bf16",
            "nanochat dev/LOG.md: depth 12 slower on H100; llm-foundry: 1.10 to 1.15 of eager bf16 at 1 to 3 B",
        )
    elif tokens and max(tokens) < PAYING_TOKENS:
        yield slower(
            f"{max(tokens)} tokens per forward are below {PAYING_TOKENS}: matmuls are too small", "torchao float8 roofline"
        )


def _units(case: Case, scaling: str) -> Iterator[Reason]:
    least, (lowest, above) = case.machine.min_capability(), CAPABILITIES.get(scaling, ((8, 9), (99, 0)))
    if least is not None and not lowest <= least < above:
        wanted = f"compute capability {lowest[0]}.{lowest[1]} to below {above[0]}.{above[1]}"
        yield unsupported(
            f"scaling {scaling} needs {wanted}, found {least[0]}.{least[1]}", remedy="--layer.precision.scaling current"
        )


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Reroute every supported site through a Transformer Engine module that shares the model's parameters."""
    from gptoughts.layers.support.transformer_engine import Fused, transformer_engine

    te, recipes = transformer_engine()
    kind, multiple = SCALINGS[options["scaling"]], MULTIPLES[options["scaling"]]
    if not hasattr(recipes, kind):
        raise LayerError(
            f"precision=fp8-te: this Transformer Engine has no {kind}",
            fix="--layer.precision.scaling delayed, or a newer version",
        )
    sites, left_out = sites_of(engine)
    fused = Fused(
        te, getattr(recipes, kind)(), [site for site in sites if site.divisible(multiple)], len(sites), engine.device.type
    )
    fused.left_out = left_out
    if not fused.sites:
        raise LayerError(
            f"precision=fp8-te: none of {len(sites)} sites of {engine.family.name} has widths divisible by {multiple}"
        )
    with ExitStack() as stack:
        for undo in fused.install():
            stack.callback(undo)
        stack.callback(engine.wrap("materialize", fused.relink))
        stack.callback(engine.wrap_context("forward_context", fused.training))
        stack.callback(engine.wrap_context("eval_context", fused.evaluating))
        engine.extras[NAME] = fused
        stack.callback(engine.extras.pop, NAME)
        yield


def sites_of(engine: Engine) -> tuple[list[Any], Mapping[str, int]]:
    """Return the sites for modules (the family's fused ones if it has any), and counts of other matmuls in the blocks."""
    from gptoughts.models.kernels.fusion import linear_sites, projections

    if engine.family.sites is not None:
        return engine.family.sites(engine.bare), {}
    found = projections(engine.bare, engine.blocks)
    return linear_sites(found), found.left_out


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require two FP8 matmuls per converted projection and micro-batch, and for delayed scaling a history."""
    fused = engine.extras.get(NAME)
    if fused is None:
        return inactive("no module uses Transformer Engine")
    rerouted = [site for site in fused.sites if site.at.__dict__.get("forward") is not None]
    kernels, converted = fp8_launches(trace.kernels), len(rerouted)
    count, fitting = sum(len(site.linears) for site in rerouted), len(fused.sites)
    needed = PRODUCTS * sum(len(site.linears) for site in fused.sites) * trace.micro_batches
    text = f"{converted} of {fused.total} sites, {kernels} FP8 matmuls for {count} projections"
    stays = {"sites with unsupported widths": fused.total - fitting, **fused.left_out}
    text += "".join(f", {number} {what} in bf16" for what, number in stays.items() if number)
    figures = {"converted": converted, "kernels": kernels, "skipped": fused.total - fitting}
    if not trace.kernels and engine.device.type == "cuda":
        return unproven(f"{text}: the profiler saw no kernel", **figures)
    if converted < fitting or not fitting or kernels < needed:
        return inactive(text, **figures)
    histories = [value for name, value in fused.state_dict().items() if name.endswith("amax_history")]
    if options["scaling"] == "delayed" and not any(bool((history > 0).any()) for history in histories):
        return inactive(f"{text}, no scale has a history", **figures)
    return active(text, **figures)


LAYER = Layer(
    name=NAME,
    slot="precision",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=lambda case, options, budget: budget.half(),  # FP8 weights are kept twice: as is and transposed
    unmet=unmet,
    packages=(("transformer-engine", "fp8"),),
    min_capability=(8, 9),
    options={"scaling": Option("current", "scaling recipe", choices=tuple(SCALINGS))},
    wraps=("forward_context", "eval_context", "materialize"),
    clashes={"compile-blocks": OPAQUE, "compile-model": OPAQUE, "cuda-graph": OPAQUE},
    changes_numerics=True,
    tolerance=(5e-2, 0.95),
    compute_dtype="bf16",
    repeatable_on_gpu=False,
    warmup_steps=1,
)
