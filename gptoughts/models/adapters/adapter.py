"""LoRA, rsLoRA, DoRA and PiSSA adapters on the frozen base of any family, with peft's layers.

peft's layers are injected into the blocks in place; parameter names, initialization and files are defined here. A projection X
becomes X.base_layer (frozen) with X.lora_A.default and X.lora_B.default (trained). Every linear projection inside a block can be
adapted. Embedding, head, norms, routers and experts stacked in one three-dimensional tensor stay frozen: peft adapts stacked
experts only by rebuilding every expert's weight in each forward. `summary` lists the frozen projections.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gptoughts.config.recipe import AdapterConfig, ModelConfig
from gptoughts.errors import ConfigError, nearest
from gptoughts.models.adapters.frozen import HALF_TYPES, hold
from gptoughts.models.adapters.nf4 import NF4Linear, is_turned, quantize, quiet
from gptoughts.models.family import Family, Initial
from gptoughts.models.sources import shape_of

NAME = "default"  # peft's default adapter name
TRAINED = re.compile(rf"\.lora_(A|B|magnitude_vector)\.{NAME}\.weight$")
ROUTERS = ("gate", "router")


# --- names


def is_trained(name: str) -> bool:
    """Return whether a parameter of an adapted model belongs to the adapter."""
    return TRAINED.search(name) is not None


def base_name(name: str) -> str:
    """Return the name of a frozen parameter or module in the model without adapter."""
    return name.replace(".base_layer", "")


# --- target projections


def projections(family: Family, model: nn.Module) -> dict[str, nn.Module]:
    """Return name -> linear projection inside a block, in order. Weights are out x in, or in x out in transformers' Conv1D."""
    return {
        f"{block}.{name}": module
        for block, inside in family.blocks(model).items()
        for name, module in inside.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and name.rpartition(".")[2] not in ROUTERS
    }


def matched_targets(targets: str, known: Sequence[str]) -> list[str]:
    """Return the projections that `adapter.targets` matches by the end of their path. Raises ConfigError."""
    if not known:
        raise ConfigError("adapter.kind: this model has no blocks with linear projections", fix="--adapter.kind none")
    if targets.strip() == "all-linear":
        return list(known)
    words = [word.strip() for word in targets.split(",") if word.strip()]
    available = list(dict.fromkeys(name.rpartition(".")[2] for name in known))
    choices = f"--adapter.targets with some of {', '.join(available)}, or all-linear"
    for word in words:
        if not any(_ends_in(name, word) for name in known):
            problem = f"adapter.targets: no projection inside a block matches {word!r}{nearest(word, available)}"
            raise ConfigError(problem, fix=choices)
    if not words:
        raise ConfigError("adapter.targets: empty", fix=choices)
    return [name for name in known if any(_ends_in(name, word) for word in words)]


def _ends_in(name: str, word: str) -> bool:
    return name == word or name.endswith(f".{word}")


# --- peft


def peft() -> Any:
    """Import peft, which imports bitsandbytes if installed. Raises ConfigError if peft is missing."""
    try:
        with quiet():
            import peft
    except ImportError as error:
        raise ConfigError(f"adapter.kind: needs the package peft: {error}", fix="pip install peft") from error
    return peft


def adapted(family: Family, config: AdapterConfig) -> Family:
    """Return `family` with an adapter in its blocks and everything else frozen. `build` raises ConfigError for unknown targets.

    The other fields work as before, except `sites`, which is None: a fused module would bypass the adapter.
    """

    def lora_config(model: nn.Module) -> Any:
        known = projections(family, model)
        names = matched_targets(config.targets, list(known))
        if config.targets.strip() == "all-linear":
            names = [name for name in names if name not in ambiguous_targets(model, names)]
        narrow = [name for name in names if config.rank > min(base_shape(known[name]))]
        if narrow and config.kind == "pissa":
            limit = min(base_shape(known[narrow[0]]))
            problem = f"adapter.rank: PiSSA needs at most the {limit} singular values of {narrow[0]}"
            raise ConfigError(problem, found=config.rank, fix=f"--adapter.rank {limit}")
        return peft().LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=names,
            use_rslora=config.kind == "rslora",
            use_dora=config.kind == "dora",
        )

    return with_injected(family, lora_config, config.base)


def with_injected(family: Family, lora_config: Callable[[nn.Module], Any], base: Literal["full", "nf4"]) -> Family:
    """Return `family` whose `build` also injects the LoraConfig that `lora_config` returns for the model."""

    def build(config: ModelConfig, rows: int, length: int) -> nn.Module:
        model = family.build(config, rows, length)
        if type(model).__name__ == "HFEncoder":  # its answer head is randomly initialized and would never be trained
            raise ConfigError(
                "adapter.kind: with objective question-answering the new answer head would stay frozen",
                fix="--adapter.kind none",
            )
        peft_config = lora_config(model)
        if base == "nf4":
            quantize(model, projections(family, model))
        elif config.path:
            from gptoughts.models.hf.weights import stored_dtype  # imports transformers

            stored = stored_dtype(config)
            if stored in HALF_TYPES:
                hold(model, projections(family, model), stored)
        inject(family, model, peft_config)
        return model

    def initial(name: str, shape: Sequence[int], config: ModelConfig) -> Initial:
        own = adapter_initial(name, shape)
        if own is not None:
            return own
        assert family.initial is not None
        return family.initial(base_name(name), shape, config)

    return replace(family, build=build, initial=initial if family.initial else None, sites=None)


def ambiguous_targets(model: nn.Module, names: Sequence[str]) -> set[str]:
    """Return the projections whose adapter peft could not load, because it maps their last name to the fused experts.

    In some models peft turns targets such as gate_proj, which dense blocks and shared experts have, into the experts'
    gate_up_proj. peft's own conversion is called for each name.
    """
    peft()
    hf_model = getattr(model, "inner", model)
    if not hasattr(getattr(hf_model, "config", None), "model_type"):
        return set()  # peft converts targets only for models of transformers
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers as convert
    except ImportError:
        return set()  # this peft version does not convert targets
    moved = set()
    for word in {name.rpartition(".")[2] for name in names}:
        probe = peft().LoraConfig(target_modules=[word])
        try:
            convert(probe, model=hf_model, conversions=None)
        except ValueError:  # refuses one part of a fused projection
            moved.add(word)
        else:
            moved |= {word} - set(probe.target_modules)
    return {name for name in names if name.rpartition(".")[2] in moved}


def inject(family: Family, model: nn.Module, lora_config: Any) -> None:
    """Wrap the projections that `lora_config` names in peft's layers, in place, and freeze all but the adapter."""
    before = projections(family, model)
    ambiguous = {name.rpartition(".")[2] for name in ambiguous_targets(model, list(before))}
    named = lora_config.target_modules if isinstance(lora_config.target_modules, set | list) else ()
    refused = sorted(ambiguous & {name.rpartition(".")[2] for name in named})
    if refused:
        usable = dict.fromkeys(word for name in before if (word := name.rpartition(".")[2]) not in ambiguous)
        raise ConfigError(
            f"adapter.targets: peft maps {', '.join(refused)} to this model's fused experts and could not load the adapter",
            fix=f"--adapter.targets with some of {', '.join(usable)}",
        )
    lora_config.init_lora_weights = False  # values come from a Source; peft's own initialization may change the base
    lora_config.fan_in_fan_out = any(type(module).__name__ == "Conv1D" for module in before.values())
    peft().inject_adapter_in_model(lora_config, model, adapter_name=NAME)
    layers = adapter_layers(model)
    outside = [name for name in layers if name not in before]
    if outside or not layers:
        problem = f"changes {', '.join(outside)}, outside the blocks" if outside else "matches no projection"
        raise ConfigError(f"target_modules: {problem}")
    for layer in layers.values():
        if NAME in layer.lora_magnitude_vector:
            layer.lora_magnitude_vector[NAME] = Magnitude(layer.lora_magnitude_vector[NAME].weight)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name))


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """Return name in the base -> peft's layer."""
    return {
        name: module for name, module in model.named_modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


class Magnitude(nn.Module):
    """DoRA's row magnitudes (Liu et al. 2024). torch.compile cannot trace peft's own module, which checks types by name."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Linear,
        lora_B: nn.Linear,
        scaling: float,
        base_layer: Any,
        base_result: Tensor | None = None,
        adapter_name: str = NAME,
    ) -> Tensor:
        """Return the term to add to the base's output. The norm of W + BA is a constant in the backward, as published."""
        with torch.no_grad():
            norm = row_norms(projection_weight(base_layer) + scaling * (lora_B.weight @ lora_A.weight))
        ratio = self.weight / norm
        result = base_layer(x) if base_result is None else base_result  # without base_result, x went through dropout
        if base_layer.bias is not None:
            result = result - base_layer.bias
        return (ratio - 1) * result + ratio * (scaling * lora_B(lora_A(x)))


def projection_weight(module: Any) -> Tensor:
    """Return the weight of a projection, out x in; unpacked if it is packed."""
    weight: Tensor = module.weight
    return weight.t() if is_turned(module) and not isinstance(module, NF4Linear) else weight


def row_norms(weight: Tensor) -> Tensor:
    """Return the Euclidean norm of each row of an out x in weight, float32."""
    return torch.linalg.vector_norm(weight.float(), dim=1)


def base_shape(module: Any) -> tuple[int, ...]:
    """Return the weight's shape in the model without adapter."""
    if isinstance(module, NF4Linear):
        outer, inner = module.shape
        return (inner, outer) if module.transposed else (outer, inner)
    return tuple(shape_of(module.weight))


def adapter_initial(name: str, shape: Sequence[int]) -> Initial | None:
    """Return the initialization of a trained parameter, or None for one of the base.

    B is zero, so that training starts at the base; A is normal (Hu et al. 2021) with the variance of peft's uniform initialization.
    Raises ConfigError for DoRA's magnitudes, which are computed from the base.
    """
    match = TRAINED.search(name)
    if match is None:
        return None
    if match[1] == "magnitude_vector":
        raise ConfigError(f"{name}: computed from the base's weights, so only AdapterSource can initialize it")
    return Initial("zeros") if match[1] == "B" else Initial("normal", 1 / math.sqrt(3 * shape[1]))
