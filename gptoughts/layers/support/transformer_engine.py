"""Transformer Engine modules that share a model's parameters. The only file that imports the package.

Written against its sources, 2.4 to 2.20: constructors and parameters of Linear, LayerNormLinear and LayerNormMLP, the keys of `fp8_meta`,
and the preparation in `set_extra_state` before it copies a history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from gptoughts.errors import LayerError
from gptoughts.models.kernels.fusion import Site
from gptoughts.models.patching import pass_through, reroute, share


def transformer_engine() -> tuple[Any, Any]:
    """Import Transformer Engine and its recipes. Raises LayerError with its error if the installation is broken."""
    try:
        import transformer_engine.common.recipe as recipes
        import transformer_engine.pytorch as te
    except (ImportError, RuntimeError, OSError, AssertionError, AttributeError) as error:  # its own checks are assertions
        raise LayerError(
            f"precision=fp8-te: transformer_engine is installed but fails to import: {type(error).__name__}: {error}"
        ) from error
    return te, recipes


class Fused:
    """Transformer Engine modules of a model, and the scale history for checkpoints."""

    def __init__(self, te: Any, recipe: Any, sites: list[Site], total: int, device_type: str) -> None:
        self.te, self.recipe, self.sites, self.total, self.device_type = te, recipe, sites, total, device_type
        self.left_out: Mapping[str, int] = {}
        self.modules = [_module(te, site) for site in sites]
        self._in_forward = self._in_evaluation = False

    def install(self) -> list[Any]:
        """Reroute forwards. Returns the undo functions."""
        undo = []
        for site, module in zip(self.sites, self.modules, strict=True):
            undo.append(reroute(site.at, self._also_when_recomputed(module)))
            if site.norm is not None:
                undo.append(reroute(site.norm, pass_through))
        return undo

    def _also_when_recomputed(self, module: Any) -> Callable[[Any], Any]:
        """Return `module` with FP8 enabled also when a backward recomputes it, outside of the forward's contexts."""

        def forward(hidden: Any) -> Any:
            if self._in_forward or self._in_evaluation or not torch.is_grad_enabled():
                return module(hidden)
            if self.recipe.delayed():
                raise LayerError(
                    "precision=fp8-te: delayed scales change before a block is recomputed",
                    fix="--layer.precision.scaling current, or --layer.recompute keep",
                )
            with self.quantized():
                return module(hidden)

        return forward

    def quantized(self) -> AbstractContextManager[Any]:
        """Return Transformer Engine's FP8 context; older versions use another name and other arguments."""
        if hasattr(self.te, "autocast"):
            return self.te.autocast(enabled=True, recipe=self.recipe)
        return self.te.fp8_autocast(enabled=True, fp8_recipe=self.recipe)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Enter FP8 for a training forward."""
        self._in_forward = True
        try:
            with _bf16(self.device_type), self.quantized():
                yield
        finally:
            self._in_forward = False

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Enter bf16 for a forward without gradients; the history does not change."""
        self._in_evaluation = True
        try:
            with _bf16(self.device_type):
                yield
        finally:
            self._in_evaluation = False

    def relink(self, materialize: Any, source: Any) -> None:
        """Materialize the parameters, then share them with the modules."""
        materialize(source)
        for site, module in zip(self.sites, self.modules, strict=True):
            share(module, _parameters(site))

    def state_dict(self) -> dict[str, Any]:
        """Return scales and amax histories as tensors; Transformer Engine's own extra state is a pickle."""
        state = {}
        for site, module in zip(self.sites, self.modules, strict=True):
            for key in ("scaling_fwd", "scaling_bwd"):
                meta = module.fp8_meta.get(key)
                for part in ("scale", "amax_history"):
                    if hasattr(meta, part):
                        state[f"{site.name}.{key}.{part}"] = getattr(meta, part)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the history into tensors that Transformer Engine otherwise creates in the first forward.

        Inside its FP8 context, from which modules read the recipe when they create quantizers; without gradients, because leaving the
        context would update the scales.
        """
        if not state:  # reset to the state before the first step
            for name, kept in self.state_dict().items():
                kept.fill_(1.0 if name.endswith(".scale") else 0.0)
            return
        with torch.no_grad(), self.quantized():
            for site, module in zip(self.sites, self.modules, strict=True):
                if not any(name.startswith(f"{site.name}.") for name in state):
                    continue
                module.fp8_meta["num_gemms"] = 2 if site.kind == "norm-mlp" else 1
                module.fp8_meta["recipe"] = self.recipe
                module.init_fp8_meta_tensors(self.recipe)
                for key in ("scaling_fwd", "scaling_bwd"):
                    for part in ("scale", "amax_history"):
                        saved = state.get(f"{site.name}.{key}.{part}")
                        if saved is not None:
                            getattr(module.fp8_meta[key], part).copy_(saved)


def _module(te: Any, site: Site) -> Any:
    first, last = site.linears[0], site.linears[-1]
    common = {"bias": first.bias is not None, "device": "meta"}
    if site.kind == "linear":
        return te.Linear(first.in_features, first.out_features, **common)
    common |= {"eps": site.epsilon, "normalization": site.normalization}
    if site.kind == "norm-linear":
        return te.LayerNormLinear(first.in_features, first.out_features, **common)
    return te.LayerNormMLP(first.in_features, last.in_features, activation=site.activation, **common)


def _parameters(site: Site) -> dict[str, Any]:
    """Return the parameters of a site under Transformer Engine's names."""
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
    return torch.autocast(device_type, dtype=torch.bfloat16)
