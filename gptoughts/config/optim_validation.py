"""Which keys of [optim] an optimizer uses, and what it cannot be combined with. Imports nothing, so a recipe is checked without torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

USES = {
    "adamw": ("beta1", "beta2", "epsilon"),
    "muon": ("beta1", "beta2", "epsilon", "momentum"),
    "lion": ("beta1", "beta2"),
    "apollo": ("beta1", "beta2", "epsilon", "rank", "projection_gap"),
    "apollo-mini": ("beta1", "beta2", "epsilon", "projection_gap"),
    "ademamix": ("beta1", "beta2", "beta3", "alpha", "epsilon"),
    "schedule-free": ("beta1", "beta2", "epsilon"),
}
"""Optimizer -> the keys that only some optimizers have. Rate, schedule, weight_decay and clip_norm belong to all."""

PARTIAL = tuple(dict.fromkeys(key for keys in USES.values() for key in keys))
"""Every key that some optimizer does not use."""

ABOVE_ZERO = {"ademamix": ("beta1", "beta3"), "schedule-free": ("beta1",)}
"""Decays that the optimizer divides by, or takes the logarithm of."""


def problems(config: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What in an `OptimConfig` cannot be: a text and the keys at fault, for every problem.

    A key that the optimizer does not use and that has another value than its default would be a wish that nobody hears.
    """
    name, fields = config.name, type(config).model_fields
    unheard = tuple(
        key for key in PARTIAL if key not in USES.get(name, PARTIAL) and getattr(config, key) != fields[key].default
    )
    if unheard:
        defaults = ", ".join(f"{key} = {fields[key].default}" for key in unheard)
        yield (
            f"{name} does not use {' and '.join(unheard)}; leave out what it does not use, or give the default ({defaults})",
            ("name", *unheard),
        )
    zero = tuple(key for key in ABOVE_ZERO.get(name, ()) if not getattr(config, key) > 0)
    if zero:
        yield f"{name} needs {' and '.join(zero)} above 0", ("name", *zero)
    if name == "schedule-free" and config.schedule != "constant":
        yield (
            f'schedule-free averages weights instead of lowering the rate, so schedule {config.schedule} cannot be; set schedule = "constant"',
            ("name", "schedule"),
        )
    if config.schedule != "constant" and config.min_learning_rate > config.learning_rate:
        yield (
            f"min_learning_rate {config.min_learning_rate:g} is above learning_rate {config.learning_rate:g}, and the rate would rise; "
            "lower it too",
            ("learning_rate", "min_learning_rate"),
        )
