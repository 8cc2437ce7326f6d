"""Projections in 8-bit floating point through Transformer Engine, with norm and MLP fused around them.

Each block gets the largest module that it allows: norm + qkv, attention output, norm + MLP. Parameters stay the model's own, in
float32 under their own names; embedding, head and attention stay in bf16, and evaluation runs in bf16. Widths that are not divisible
by 16 stay as they are and are counted. It hurts below a width of about 2,048 and with few tokens per forward: quantising then costs
more than the matmuls save, and Transformer Engine's modules cannot be compiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from gptoughts.layer import (
    Case,
    Engine,
    Evidence,
    Layer,
    Option,
    Options,
    Reason,
    Sight,
    active,
    cannot,
    inactive,
    unproven,
    would_not_pay,
)

MULTIPLE = 16
PAYING_WIDTH = 2048
PAYING_TOKENS = 4096
# Names of cuBLASLt's FP8 kernels on Hopper and later; re-checked by tests/device.
KERNELS = ("e4m3", "e5m2", "nvjet_qq", "qgmma", "f8f8")
# Quantisation names the same types.
NOT_MATMULS = ("cast", "transpose", "quantize", "amax")
SCALINGS = {
    "delayed": "DelayedScaling",
    "current": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}


def fits(case: Case, options: Options) -> Iterator[Reason]:
    """FP8 units, projections that are plain linear layers, and matmuls large enough to win."""
    facts, least = case.facts, case.machine.least_capability()
    if facts.family is None:
        yield cannot("needs a model of a known family, whose projections are known")
        return
    if case.recipe.model.family == "hf" or case.recipe.adapter.kind != "none":
        what = "an adapter's projections" if case.recipe.adapter.kind != "none" else "models of transformers"
        yield cannot(f"fused modules are put into native models only so far, not into {what}")
        return
    if facts.projections not in (None, "linear"):
        yield cannot(f"needs nn.Linear projections, {facts.family} uses {facts.projections}")
    if options["scaling"] == "mxfp8" and least is not None and not (10, 0) <= least < (12, 0):
        found = f"{least[0]}.{least[1]}"
        yield cannot(f"scaling mxfp8 needs compute capability 10.x, found {found}", remedy="--layer.precision.scaling current")
    if facts.width is not None and facts.width % MULTIPLE:
        yield cannot(f"needs widths divisible by {MULTIPLE}, the model has {facts.width}")
    tokens = case.rank_sequences * (facts.sequence_length or 0)
    if tokens and tokens % MULTIPLE:
        yield cannot(f"needs a number of tokens per forward divisible by {MULTIPLE}, here {tokens}")
    if facts.width is not None and facts.width < PAYING_WIDTH:
        yield would_not_pay(
            f"width {facts.width} is below {PAYING_WIDTH}, where FP8 lost against compiled bf16",
            "nanochat dev/LOG.md: depth 12 slower on H100",
        )
    elif tokens and tokens < PAYING_TOKENS:
        yield would_not_pay(
            f"{tokens} tokens per update are below {PAYING_TOKENS}: the matmuls are too small", "torchao float8 roofline"
        )


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Send the forward of every fitting site through a Transformer Engine module that computes with the model's own parameters."""
    from gptoughts.errors import LayerError

    try:
        import transformer_engine.pytorch as te
    except (ImportError, RuntimeError, OSError) as error:  # a broken build raises RuntimeError, not ImportError
        raise LayerError(f"precision fp8-te: transformer_engine is installed and does not import: {error}") from error
    import transformer_engine.common.recipe as recipes

    sites, recipe = engine.family.sites(engine.bare), getattr(recipes, SCALINGS[options["scaling"]])()
    fused = Fused(te, recipe, [site for site in sites if not any(width % MULTIPLE for width in site.widths)], len(sites))
    with ExitStack() as stack:
        for undo in fused.install():
            stack.callback(undo)
        stack.callback(engine.wrap("materialise", fused.relink))
        stack.callback(engine.wrap_context("forward_context", lambda: _training(te, recipe, engine.device.type)))
        stack.callback(engine.wrap_context("eval_context", lambda: _bf16(engine.device.type)))
        engine.extras["fp8-te"] = fused
        stack.callback(engine.extras.pop, "fp8-te")
        yield


class Fused:
    """The Transformer Engine modules of a model, and the scale history that a checkpoint must hold."""

    def __init__(self, te: Any, recipe: Any, sites: list[Any], total: int) -> None:
        self.recipe, self.sites, self.total = recipe, sites, total
        self.modules = [_module(te, site) for site in sites]

    def install(self) -> list[Any]:
        """Reroute forwards. Returns the undos."""
        from gptoughts.surgery import pass_through, reroute

        undo = []
        for site, module in zip(self.sites, self.modules, strict=True):
            undo.append(reroute(site.at, module))
            if site.norm is not None:
                undo.append(reroute(site.norm, pass_through))
        return undo

    def relink(self, materialise: Any, source: Any) -> None:
        """After parameters have values, compute with those very parameters."""
        from gptoughts.surgery import share

        materialise(source)
        for site, module in zip(self.sites, self.modules, strict=True):
            share(module, _parameters(site))

    def state_dict(self) -> dict[str, Any]:
        """Scales and amax histories, as tensors: Transformer Engine's own extra state would be a pickle."""
        state = {}
        for site, module in zip(self.sites, self.modules, strict=True):
            for key in ("scaling_fwd", "scaling_bwd"):
                meta = module.fp8_meta.get(key)
                for part in ("scale", "amax_history"):
                    if hasattr(meta, part):
                        state[f"{site.name}.{key}.{part}"] = getattr(meta, part)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the history back, into tensors that Transformer Engine would otherwise make in the first forward."""
        for site, module in zip(self.sites, self.modules, strict=True):
            if not any(name.startswith(f"{site.name}.") for name in state):
                continue
            module.fp8_meta["num_gemms"] = 2 if site.kind == "norm-mlp" else 1
            module.init_fp8_meta_tensors(self.recipe)
            for key in ("scaling_fwd", "scaling_bwd"):
                for part in ("scale", "amax_history"):
                    saved = state.get(f"{site.name}.{key}.{part}")
                    if saved is not None:
                        getattr(module.fp8_meta[key], part).copy_(saved)


def _module(te: Any, site: Any) -> Any:
    first, last = site.linears[0], site.linears[-1]
    common = {"bias": first.bias is not None, "device": "meta"}
    if site.kind == "linear":
        return te.Linear(first.in_features, first.out_features, **common)
    common |= {"eps": site.epsilon, "normalization": site.normalization}
    if site.kind == "norm-linear":
        return te.LayerNormLinear(first.in_features, first.out_features, **common)
    return te.LayerNormMLP(first.in_features, last.in_features, activation=site.activation, **common)


def _parameters(site: Any) -> dict[str, Any]:
    """Transformer Engine's names for the parameters of a site."""
    first, last = site.linears[0], site.linears[-1]
    shared: dict[str, Any] = {}
    if site.norm is not None:
        shared["layer_norm_weight"] = site.norm.weight
        if site.normalization == "LayerNorm":
            shared["layer_norm_bias"] = site.norm.bias
    if site.kind == "norm-mlp":
        pairs = {"fc1_weight": first.weight, "fc1_bias": first.bias, "fc2_weight": last.weight, "fc2_bias": last.bias}
    else:
        pairs = {"weight": first.weight, "bias": first.bias}
    return shared | {name: parameter for name, parameter in pairs.items() if parameter is not None}


def _bf16(device_type: str) -> AbstractContextManager[Any]:
    import torch

    return torch.autocast(device_type, dtype=torch.bfloat16)


@contextmanager
def _training(te: Any, recipe: Any, device_type: str) -> Iterator[None]:
    quantised = (
        te.autocast(enabled=True, recipe=recipe)
        if hasattr(te, "autocast")
        else te.fp8_autocast(enabled=True, fp8_recipe=recipe)
    )
    with _bf16(device_type), quantised:
        yield


def verify(engine: Engine, sight: Sight, options: Options) -> Evidence:
    """FP8 matmuls ran, at least two per converted projection and micro-batch, and delayed scales have a history."""
    fused = engine.extras.get("fp8-te")
    if fused is None:
        return inactive("no module runs through Transformer Engine")
    if not sight.kernels and engine.device.type == "cuda":
        return unproven("the profiler saw no kernel at all")
    matmuls = {name: count for name, count in sight.kernels.items() if not any(part in name.lower() for part in NOT_MATMULS)}
    kernels = sum(count for name, count in matmuls.items() if any(part in name.lower() for part in KERNELS))
    converted, projections = len(fused.sites), sum(len(site.linears) for site in fused.sites)
    text = f"{converted} of {fused.total} sites, {kernels} FP8 matmuls for {projections} projections"
    if (
        converted == 0 or kernels < 2 * projections * sight.micro_batches
    ):  # forward, and at least one of the two of the backward
        return inactive(text, converted=converted, kernels=kernels)
    histories = [value for name, value in fused.state_dict().items() if name.endswith("amax_history")]
    if options["scaling"] == "delayed" and not any(bool((history > 0).any()) for history in histories):
        return inactive(f"{text}, and no scale has a history", converted=converted, kernels=kernels)
    return active(text, converted=converted, kernels=kernels)


LAYER = Layer(
    name="fp8-te",
    slot="precision",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    fits=fits,
    packages=(("transformer-engine", "fp8"),),
    least_capability=(8, 9),
    options={"scaling": Option("current", "how scales are found", choices=tuple(SCALINGS))},
    wraps=("forward_context", "eval_context", "materialise"),
    clashes={"compile-blocks": "Transformer Engine's modules are opaque to torch.compile, which is asked for whole graphs"},
    changes_numerics=True,
    repeatable_on_gpu=False,
    warm_steps=1,
)
