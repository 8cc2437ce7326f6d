"""Weights of an adapted model for others: the frozen base's, the merged ones, and a summary of what is trained."""

from __future__ import annotations

import math
import re
from collections import Counter

import torch
from torch import Tensor, nn

from gptoughts.models.adapters.adapter import NAME, adapter_layers, base_name, is_trained, row_norms
from gptoughts.models.adapters.frozen import FrozenLinear
from gptoughts.models.adapters.nf4 import NF4Linear, is_turned


def frozen_values(model: nn.Module) -> dict[str, Tensor]:
    """Return base name -> base weight, on the CPU. 16-bit weights are float32 here, and a packed base is returned after its rounding, as
    the adapter was trained on it.
    """
    kept = model.state_dict().keys()
    named = [*model.named_parameters(), *((name, buffer) for name, buffer in model.named_buffers() if name in kept)]
    packed = {name: module for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    narrow = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    values = {
        base_name(name): (value.float() if name in narrow else value).detach().cpu()
        for name, value in named
        if not is_trained(name) and (name.rpartition(".")[0] not in packed or name.endswith(".bias"))
    }
    with torch.no_grad():
        for name, module in packed.items():
            values[f"{base_name(name)}.weight"] = (module.weight.t() if module.transposed else module.weight).cpu()
    return values


def merge(model: nn.Module) -> dict[str, Tensor]:
    """Return base name -> weight with the adapter merged, on the CPU. Does not change the model."""
    values = frozen_values(model)
    with torch.no_grad():
        for name, layer in adapter_layers(model).items():
            before = values[f"{name}.weight"]
            transposed = is_turned(layer.base_layer)
            merged = before.float().t() if transposed else before.float()
            merged = merged + layer.scaling[NAME] * (layer.lora_B[NAME].weight @ layer.lora_A[NAME].weight).float().cpu()
            if NAME in layer.lora_magnitude_vector:
                magnitude = layer.lora_magnitude_vector[NAME].weight.float().cpu()
                merged = merged * (magnitude / row_norms(merged))[:, None]
            values[f"{name}.weight"] = (merged.t() if transposed else merged).contiguous().to(before.dtype)
    return values


def summary(model: nn.Module) -> str:
    """Return the trained share, the adapted and the frozen projections, as text for the log."""
    layers = adapter_layers(model)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    total = sum(p.numel() for p in model.parameters())
    total += sum(math.prod(m.shape) - m.packed.numel() - m.absmax.numel() for m in packed)
    places = Counter(name.rpartition(".")[2] for name in layers)
    layer = next(iter(layers.values()))
    lines = [
        f"adapter: {trained:,} of {total:,} parameters trained ({100 * trained / total:.2g} %)",
        f"  rank {layer.r[NAME]}, scale {layer.scaling[NAME]:g} on " + ", ".join(f"{n} x {word}" for word, n in places.items()),
    ]
    if packed:
        lines.append(f"  base: {len(packed)} projections in NF4")
    held = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    if held:
        lines.append(f"  base: {len(held)} projections in {str(held[0].weight.dtype).removeprefix('torch.')}, as stored")
    frozen = Counter(
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name and not name.endswith(".base_layer")
    )
    if frozen:
        lines.append("  not adapted: " + ", ".join(f"{n} x {word}" for word, n in frozen.items()))
    experts = {re.sub(r"\.\d+\.", ".*.", name) for name, p in model.named_parameters() if p.dim() > 2}
    if experts:
        lines.append(f"  not adapted, stacked experts: {', '.join(sorted(experts))}")
    return "\n".join(lines)
