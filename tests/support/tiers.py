"""Parameters of tests whose full product is in the slow tier."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_unless(is_default: Callable[..., bool], values: Iterable[Any]) -> list[Any]:
    """Return `values` for `parametrize`; those for which `is_default(*value)` is false are marked slow."""
    params = []
    for value in values:
        row = value if isinstance(value, tuple) else (value,)
        params.append(value if is_default(*row) else pytest.param(*row, marks=pytest.mark.slow))
    return params


def slow_except(values: Iterable[Any], *default: Any) -> list[Any]:
    """Return `values` for `parametrize`; those not in `default` are marked slow."""
    return slow_unless(lambda *row: (row if len(row) > 1 else row[0]) in default, values)
