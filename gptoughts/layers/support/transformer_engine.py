"""Transformer Engine's modules over a model's own parameters. The only file that imports the package.

Written against its sources, 2.4 to 2.20: constructors and parameters of Linear, LayerNormLinear and LayerNormMLP, the keys of `fp8_meta`, and
what `set_extra_state` does before it copies a history.
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
    """Transformer Engine and its recipes. Raises LayerError with its own error where it is installed and broken."""
    try:
        import transformer_engine.common.recipe as recipes
        import transformer_engine.pytorch as te
    except (ImportError, RuntimeError, OSError, AssertionError, AttributeError) as error:  # its own checks are assertions
        raise LayerError(
            f"precision fp8-te: transformer_engine is installed and does not import: {type(error).__name__}: {error}"
        ) from error
    return te, recipes


class Fused:
    """The Transformer Engine modules of a model, and the scale history that a checkpoint must hold."""

    def __init__(self, te: Any, recipe: Any, sites: list[Site], total: int, device_type: str) -> None:
        self.te, self.recipe, self.sites, self.total, self.device_type = te, recipe, sites, total, device_type
        self.left_out: Mapping[str, int] = {}
        self.modules = [_module(te, site) for site in sites]
        self._in_forward = self._in_evaluation = False

    def install(self) -> list[Any]:
        """Reroute forwards. Returns the undos."""
        undo = []
        for site, module in zip(self.sites, self.modules, strict=True):
            undo.append(reroute(site.at, self._also_when_recomputed(module)))
            if site.norm is not None:
                undo.append(reroute(site.norm, pass_through))
        return undo

    def _also_when_recomputed(self, module: Any) -> Callable[[Any], Any]:
        """`module`, in FP8 also where a backward calls it again, outside of every context of a forward."""

        def forward(hidden: Any) -> Any:
            if self._in_forward or self._in_evaluation or not torch.is_grad_enabled():
                return module(hidden)
            if self.recipe.delayed():
                raise LayerError(
                    "precision fp8-te: delayed scaling has moved its scales by the time that a block is recomputed\n"
                    "  try: --layer.precision.scaling current, or --layer.recompute keep"
                )
            with self.quantized():
                return module(hidden)

        return forward

    def quantized(self) -> AbstractContextManager[Any]:
        """Transformer Engine's own context; older versions have it under another name and with other words."""
        if hasattr(self.te, "autocast"):
            return self.te.autocast(enabled=True, recipe=self.recipe)
        return self.te.fp8_autocast(enabled=True, fp8_recipe=self.recipe)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around a training forward."""
        self._in_forward = True
        try:
            with _bf16(self.device_type), self.quantized():
                yield
        finally:
            self._in_forward = False

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around a forward without gradients: bf16, and nothing enters the history."""
        self._in_evaluation = True
        try:
            with _bf16(self.device_type):
                yield
        finally:
            self._in_evaluation = False

    def relink(self, materialize: Any, source: Any) -> None:
        """After parameters have values, compute with those very parameters."""
        materialize(source)
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
        """Take the history back, into tensors that Transformer Engine would otherwise make in the first forward.

        Inside its context, because modules ask there which recipe is meant while they make their quantizers; without gradients, because
        leaving the context would move the scales.
        """
        if not state:  # as before the first step
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
    return torch.autocast(device_type, dtype=torch.bfloat16)
