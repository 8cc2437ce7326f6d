"""Parameter-efficient fine-tuning: a few trained weights (peft's LoRA, rsLoRA, DoRA, PiSSA) beside a frozen base, in any family.

The layers are peft's own, put into the family's blocks in place; names, first values and what is on disk are decided here. A
projection X becomes X.base_layer (frozen) with X.lora_A.default and X.lora_B.default (trained). Every linear projection inside a
block can be adapted. Embedding, head, norms, routers and experts that stand together in one three-dimensional tensor stay frozen:
peft would adapt those only by building every expert's changed weight anew in each forward. `summary` names what stays frozen.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

from gptoughts.config.recipe import AdapterConfig, ModelConfig
from gptoughts.errors import ConfigError, nearest
from gptoughts.models.adapters.nf4 import NF4Linear, is_turned, quantize, quiet
from gptoughts.models.family import Family, Initial

NAME = "default"  # peft's, of an adapter that nobody named
TRAINED = re.compile(rf"\.lora_(A|B|magnitude_vector)\.{NAME}\.weight$")
ROUTERS = ("gate", "router")


# --- names


def is_trained(name: str) -> bool:
    """Whether a parameter of an adapted model belongs to the adapter."""
    return TRAINED.search(name) is not None


def base_name(name: str) -> str:
    """The name that a frozen parameter or module has in the model without adapter."""
    return name.replace(".base_layer", "")


# --- which projections


def projections(family: Family, model: nn.Module) -> dict[str, nn.Module]:
    """Name -> linear projection inside a block, in order; the weight is out x in, or in x out in transformers' Conv1D."""
    return {
        f"{block}.{name}": module
        for block, inside in family.blocks(model).items()
        for name, module in inside.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and name.rpartition(".")[2] not in ROUTERS
    }


def chosen(targets: str, known: Sequence[str]) -> list[str]:
    """The projections that `adapter.targets` means. A word names all whose path ends in it. Raises ConfigError."""
    if not known:
        raise ConfigError("[adapter]: this model has no blocks with linear projections to adapt")
    if targets.strip() == "all-linear":
        return list(known)
    words = [word.strip() for word in targets.split(",") if word.strip()]
    there = list(dict.fromkeys(name.rpartition(".")[2] for name in known))
    for word in words:
        if not any(_ends_in(name, word) for name in known):
            raise ConfigError(
                f"adapter.targets: no projection inside a block is called {word!r}{nearest(word, there)}\n"
                f"  here are: {', '.join(there)}, or all-linear"
            )
    if not words:
        raise ConfigError(f"adapter.targets is empty\n  here are: {', '.join(there)}, or all-linear")
    return [name for name in known if any(_ends_in(name, word) for word in words)]


def _ends_in(name: str, word: str) -> bool:
    return name == word or name.endswith(f".{word}")


# --- peft


def peft() -> Any:
    """The package, which imports bitsandbytes where that is installed. ConfigError where it is missing."""
    try:
        with quiet():
            import peft
    except ImportError as error:
        raise ConfigError(f"[adapter] needs the package peft: {error}\n  try: pip install peft") from error
    return peft


def adapted(family: Family, config: AdapterConfig) -> Family:
    """`family` with an adapter in its blocks and everything else frozen. `build` raises ConfigError for targets that are not there.

    The other ports work as before; `sites` is not offered, for a fused module would pass the adapter by.
    """

    def lora_config(model: nn.Module) -> Any:
        known = projections(family, model)
        names = chosen(config.targets, list(known))
        if config.targets.strip() == "all-linear":
            names = [name for name in names if name not in misread(model, names)]
        narrow = [name for name in names if config.rank > min(own_shape(known[name]))]
        if narrow and config.kind == "pissa":
            raise ConfigError(f"adapter.rank = {config.rank} is more than {narrow[0]} has singular values; PiSSA needs fewer")
        return peft().LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=names,
            use_rslora=config.kind == "rslora",
            use_dora=config.kind == "dora",
        )

    return ported(family, lora_config, config.base)


def ported(family: Family, lora_config: Callable[[nn.Module], Any], base: Literal["full", "nf4"]) -> Family:
    """`family` whose `build` also injects the LoraConfig that `lora_config` gives for the model."""

    def build(config: ModelConfig, rows: int, length: int) -> nn.Module:
        model = family.build(config, rows, length)
        if type(model).__name__ == "HFEncoder":  # its head for answers is drawn, and would stay as it was drawn
            raise ConfigError(
                "adapter.kind with objective question-answering: the head for answers is new and an adapter leaves it frozen\n"
                "  try: leave adapter.kind out"
            )
        wanted = lora_config(model)
        if base == "nf4":
            quantize(model, projections(family, model))
        inject(family, model, wanted)
        return model

    def initial(name: str, shape: Sequence[int], config: ModelConfig) -> Initial:
        first = first_value(name, shape)
        if first is not None:
            return first
        assert family.initial is not None
        return family.initial(base_name(name), shape, config)

    return replace(family, build=build, initial=initial if family.initial else None, sites=None)


def misread(model: nn.Module, names: Sequence[str]) -> set[str]:
    """The projections whose adapter peft could not open: in some models it takes their last word for that of the fused experts.

    There it turns targets such as gate_proj, which dense blocks and shared experts have, into the experts' gate_up_proj. Its own
    conversion is asked, a word at a time.
    """
    peft()
    theirs = getattr(model, "inner", model)
    if not hasattr(getattr(theirs, "config", None), "model_type"):
        return set()  # peft does it for models of transformers alone
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers as convert
    except ImportError:
        return set()  # a peft that does not
    moved = set()
    for word in {name.rpartition(".")[2] for name in names}:
        probe = peft().LoraConfig(target_modules=[word])
        try:
            convert(probe, model=theirs, conversions=None)
        except ValueError:  # it will not take one part of what it fuses
            moved.add(word)
        else:
            moved |= {word} - set(probe.target_modules)
    return {name for name in names if name.rpartition(".")[2] in moved}


def inject(family: Family, model: nn.Module, lora_config: Any) -> None:
    """Put peft's layers around the projections that `lora_config` names, in place, and freeze all but the adapter."""
    before = projections(family, model)
    mistaken = {name.rpartition(".")[2] for name in misread(model, list(before))}
    named = lora_config.target_modules if isinstance(lora_config.target_modules, set | list) else ()
    both = sorted(mistaken & {name.rpartition(".")[2] for name in named})
    if both:
        raise ConfigError(
            f"adapter.targets: peft takes {', '.join(both)} for this model's fused experts, and no tool could open the adapter\n"
            f"  here are: {', '.join(dict.fromkeys(word for name in before if (word := name.rpartition('.')[2]) not in mistaken))}"
        )
    lora_config.init_lora_weights = False  # values come from a Source, and may not touch the base
    lora_config.fan_in_fan_out = any(type(module).__name__ == "Conv1D" for module in before.values())
    peft().inject_adapter_in_model(lora_config, model, adapter_name=NAME)
    layers = adapter_layers(model)
    outside = [name for name in layers if name not in before]
    if outside or not layers:
        raise ConfigError(
            f"the adapter changes {', '.join(outside)}, outside the blocks" if outside else "the adapter fits no projection"
        )
    for layer in layers.values():
        if NAME in layer.lora_magnitude_vector:
            layer.lora_magnitude_vector[NAME] = Magnitude(layer.lora_magnitude_vector[NAME].weight)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name))


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """Name in the base -> peft's layer there."""
    return {
        name: module for name, module in model.named_modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


class Magnitude(nn.Module):
    """DoRA's length of each row (Liu et al. 2024), in the place of peft's, which torch.compile cannot trace: it reads types by name."""

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
        """What has to be added to the base's result. The length of W + BA counts as a constant in the backward, as published."""
        with torch.no_grad():
            length = row_lengths(projection_weight(base_layer) + scaling * (lora_B.weight @ lora_A.weight))
        share = self.weight / length
        result = base_layer(x) if base_result is None else base_result  # x went through dropout where base_result is None
        if base_layer.bias is not None:
            result = result - base_layer.bias
        return (share - 1) * result + share * (scaling * lora_B(lora_A(x)))


def projection_weight(module: Any) -> Tensor:
    """The weight of a projection, out x in; unpacked where it is packed."""
    weight: Tensor = module.weight
    return weight.t() if is_turned(module) and not isinstance(module, NF4Linear) else weight


def row_lengths(weight: Tensor) -> Tensor:
    """The length of each row of an out x in weight, float32."""
    return torch.linalg.vector_norm(weight.float(), dim=1)


def own_shape(module: Any) -> tuple[int, ...]:
    """Of the weight as the model without adapter has it."""
    if isinstance(module, NF4Linear):
        outer, inner = module.shape
        return (inner, outer) if module.turned else (outer, inner)
    return tuple(module.weight.shape)


# --- how a trained parameter begins


def first_value(name: str, shape: Sequence[int]) -> Initial | None:
    """How a trained parameter begins; None for one of the base, ConfigError for DoRA's lengths, which follow from the base.

    B is zero, so that training starts at the base; A is normal (Hu et al. 2021) with the variance of peft's uniform draw.
    """
    match = TRAINED.search(name)
    if match is None:
        return None
    if match[1] == "magnitude_vector":
        raise ConfigError(f"{name} follows from the base's weights; ask an AdapterSource")
    return Initial("zeros") if match[1] == "B" else Initial("normal", 1 / math.sqrt(3 * shape[1]))


# --- what came out


def frozen_values(model: nn.Module) -> dict[str, Tensor]:
    """The base's own names -> its weights as the adapter was trained over them (a packed base after its rounding), on the CPU."""
    kept = model.state_dict().keys()
    named = [*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers() if name in kept)]
    packed = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    values = {
        base_name(name): value.detach().cpu()
        for name, value in named
        if not is_trained(name) and (name.rpartition(".")[0] not in packed or name.endswith(".bias"))
    }
    with torch.no_grad():
        for name, module in packed.items():
            values[f"{base_name(name)}.weight"] = (module.weight.t() if module.turned else module.weight).cpu()
    return values


def merge(model: nn.Module) -> dict[str, Tensor]:
    """The base's own names -> weights that compute what the adapted model computes, on the CPU. The model stays as it is."""
    values = frozen_values(model)
    with torch.no_grad():
        for name, layer in adapter_layers(model).items():
            before = values[f"{name}.weight"]
            turned = is_turned(layer.base_layer)
            merged = before.float().t() if turned else before.float()
            merged = merged + layer.scaling[NAME] * (layer.lora_B[NAME].weight @ layer.lora_A[NAME].weight).float().cpu()
            if NAME in layer.lora_magnitude_vector:
                length = layer.lora_magnitude_vector[NAME].weight.float().cpu()
                merged = merged * (length / row_lengths(merged))[:, None]
            values[f"{name}.weight"] = (merged.t() if turned else merged).contiguous().to(before.dtype)
    return values


def summary(model: nn.Module) -> str:
    """How much is trained, where, and what of the blocks is not; for the log."""
    layers = adapter_layers(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    total = sum(p.numel() for p in model.parameters())
    total += sum(math.prod(m.shape) - m.packed.numel() - m.absmax.numel() for m in packed)
    places = Counter(name.rpartition(".")[2] for name in layers)
    layer = next(iter(layers.values()))
    lines = [
        f"adapter: {trained:,} of {total:,} parameters are trained ({100 * trained / total:.2g} %)",
        f"  rank {layer.r[NAME]}, scale {layer.scaling[NAME]:g} on " + ", ".join(f"{n} x {word}" for word, n in places.items()),
    ]
    if packed:
        lines.append(f"  base: {len(packed)} projections in NF4")
    frozen = Counter(
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name and not name.endswith(".base_layer")
    )
    if frozen:
        lines.append("  not adapted: " + ", ".join(f"{n} x {word}" for word, n in frozen.items()))
    experts = {re.sub(r"\.\d+\.", ".*.", name) for name, p in model.named_parameters() if p.dim() > 2}
    if experts:
        lines.append(f"  not adapted, experts in one tensor: {', '.join(sorted(experts))}")
    return "\n".join(lines)
