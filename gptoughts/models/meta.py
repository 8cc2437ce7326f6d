"""Models without memory: their shapes, and no time spent on values that nobody could read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_DRAWS = (Tensor.normal_, Tensor.uniform_)


@contextmanager
def on_meta() -> Iterator[None]:
    """What is built inside lies on the meta device and is not initialized.

    Modules draw their first weights as they are built. On meta that makes nothing, and yet torch loads its compiler to do it.
    """
    with torch.device("meta"), _NothingDrawn():
        yield


class _NothingDrawn(TorchFunctionMode):
    """`torch.nn.init` and the draws below it leave tensors on meta alone."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in _DRAWS or getattr(func, "__module__", None) == nn.init.__name__:
            drawn = args[0] if args else given.get("tensor")
            if isinstance(drawn, Tensor) and drawn.is_meta:
                return drawn
        return func(*args, **given)
