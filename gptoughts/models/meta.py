"""Build models on the meta device without running their weight initialization."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_RANDOM_FILLS = (Tensor.normal_, Tensor.uniform_)


@contextmanager
def on_meta() -> Iterator[None]:
    """Create tensors of the block on the meta device and skip their initialization.

    Module constructors initialize weights. On meta that has no effect, but torch imports its compiler to do it.
    """
    with torch.device("meta"), _SkipInit():
        yield


class _SkipInit(TorchFunctionMode):
    """Skip `torch.nn.init` and the random fills that it calls for tensors on meta."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keywords = dict(kwargs or {})
        if func in _RANDOM_FILLS or getattr(func, "__module__", None) == nn.init.__name__:
            target = args[0] if args else keywords.get("tensor")
            if isinstance(target, Tensor) and target.is_meta:
                return target
        return func(*args, **keywords)
