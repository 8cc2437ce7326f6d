"""Read text token by token with a transformers model: with its cache where that is exact, else the whole text each time."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Names of the argument that takes a cache, newest first. Another name in its place is accepted and ignored."""
Read = Callable[[list[int]], Tensor]


def cached(inner: PreTrainedModel) -> Read:
    """Return a function with a new cache: it takes the next ids and returns the logits (V) of the following one.

    Raises TypeError for a model that takes no cache of transformers' general class.
    """
    name = next((name for name in CACHE_NAMES if name in _arguments(inner)), None)
    if name is None:
        raise TypeError(f"{type(inner).__name__} takes none of {', '.join(CACHE_NAMES)}")
    kwargs = {name: DynamicCache(config=inner.config), "use_cache": True, **_last(inner)}

    def read(ids: list[int]) -> Tensor:
        return _logits(inner, ids, kwargs)

    return read


def whole(inner: PreTrainedModel) -> Read:
    """Return a function like `cached` that reads all ids so far again each time."""
    kwargs, seen = {"use_cache": False, **_last(inner)}, list[int]()

    def read(ids: list[int]) -> Tensor:
        seen.extend(ids)
        return _logits(inner, seen, kwargs)

    return read


def _logits(inner: PreTrainedModel, ids: list[int], kwargs: dict[str, Any]) -> Tensor:
    weight = inner.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    input_ids = torch.tensor([ids], device=weight.device)
    logits: Tensor = inner(input_ids=input_ids, **kwargs).logits[0, -1]
    return logits


def _last(inner: PreTrainedModel) -> dict[str, Any]:
    """Return the argument that asks for the logits of the last position only, where the model has it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in _arguments(inner) else {}


def _arguments(inner: PreTrainedModel) -> tuple[str, ...]:
    return tuple(inspect.signature(inner.forward).parameters)
