"""A plain PyTorch training loop on the same model, batches and settings: the reference of `benchmarks.step`.

Every optimization that plain PyTorch offers in one line is on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gptoughts.config.loader import Recipe
from gptoughts.engine.engine import Engine
from gptoughts.models.family import Family, initialize
from gptoughts.planning.plan import Plan


@dataclass(frozen=True)
class Settings:
    """Options of the plain loop. `autocast` None computes in float32."""

    micro_batch: int
    autocast: torch.dtype | None = None
    compiled: bool = False
    fused_attention: bool = True
    fused_optimizer: bool = True


def plain_settings(plan: Plan, engine: Engine) -> Settings:
    """Return the plain loop's settings equivalent to the plan. FP8 has no one-line switch: the plain loop then computes in bf16."""
    layers = plan.layers
    return Settings(
        micro_batch=engine.micro_batch or engine.recipe.train.global_batch,
        autocast=None if layers["precision"] == "fp32" else torch.bfloat16,
        compiled=layers["compile"] != "eager",
        fused_attention=layers["attention"] != "math",
        fused_optimizer=layers["optimizer"] != "plain",
    )


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Call torch's scaled_dot_product_attention."""
    grouped = query.shape[1] != key.shape[1]
    causal = causal and mask is None
    return functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def plain_loop(
    recipe: Recipe,
    family: Family,
    rows: int,
    *,
    batches: Iterator[Any],
    device: torch.device,
    settings: Settings,
    rate: Callable[[int], float],
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Callable[[int], float]:
    """Return a function `run(steps)` that trains the recipe's model and returns the last logged loss.

    `wrap` adds data parallelism; batches, weight and loss are then those of this rank.
    """
    with device:
        model = family.build(recipe.model, rows, recipe.data.sequence_length)
    initialize(model, family, recipe.model, recipe.seed)
    if settings.fused_attention and family.set_attention is not None:
        family.set_attention(model, sdpa)
    if settings.compiled:
        for block in family.blocks(model).values():
            block.compile(fullgraph=True, dynamic=False)
    parameters = list(model.parameters())
    model = wrap(model)
    optimizer = _adamw(recipe, parameters, settings.fused_optimizer)
    autocast = torch.autocast(device.type, settings.autocast) if settings.autocast else nullcontext()
    done, last = 0, float("nan")

    def moved(array: Any) -> Tensor:
        tensor = torch.from_numpy(array)
        return (tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor).long()

    def run(steps: int) -> float:
        nonlocal done, last
        for _ in range(steps):
            batch, _ = next(batches)
            input_ids = moved(batch["input_ids"])
            labels = moved(batch["labels"]) if "labels" in batch else input_ids
            inputs, targets = input_ids[:, :-1], labels[:, 1:]
            weight = (targets != -100).sum() if "labels" in batch else targets.numel()
            total = torch.zeros((), device=device)
            for x, y in zip(inputs.split(settings.micro_batch), targets.split(settings.micro_batch), strict=True):
                with autocast:
                    loss = model(x, labels=y) / weight
                loss.backward()
                total += loss.detach()
            if recipe.optim.clip_norm > 0:
                nn.utils.clip_grad_norm_(parameters, recipe.optim.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = rate(done)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done += 1
            if done == 1 or done % recipe.log.every == 0:
                last = total.item()
        return last

    return run


def _adamw(recipe: Recipe, parameters: list[nn.Parameter], fused: bool) -> torch.optim.AdamW:
    """Return AdamW with weight decay on weights of two and more dimensions."""
    optim = recipe.optim
    decayed = {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": optim.weight_decay}
    kept = {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}
    return torch.optim.AdamW([decayed, kept], betas=(optim.beta1, optim.beta2), eps=optim.epsilon, fused=fused)
