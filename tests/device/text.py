"""Real text as ids below any number of rows, without a tokenizer and without a file: Python's own standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

MOST_BYTES = 24_000_000
SPREAD = 40503
"""Odd, so that pairs of bytes land on ids all over the embedding, as a tokenizer's do; a few rows would be a kinder gather."""


@cache
def letters(most: int = MOST_BYTES) -> np.ndarray[Any, Any]:
    """The source files one after another, in the order of their names."""
    parts, length = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py")):
        if "site-packages" in path.parts or not path.is_file():
            continue
        parts.append(path.read_bytes())
        length += len(parts[-1])
        if length >= most:
            break
    return np.frombuffer(b"".join(parts), dtype=np.uint8)


def ids(rows: int, most: int = MOST_BYTES) -> np.ndarray[Any, Any]:
    """One id below `rows` for every two bytes: text that a model can learn, so losses can be compared."""
    held = letters(most).astype(np.uint32)
    held = held[: len(held) // 2 * 2]
    pairs = held[0::2] * 256 + held[1::2]
    narrow = np.uint16 if rows <= 2**16 else np.uint32
    return (pairs * SPREAD % 65521 % rows).astype(narrow)


def windows(rows: int, length: int, count: int, most: int = MOST_BYTES) -> Iterator[np.ndarray[Any, Any]]:
    """Endless batches of `count` windows of `length` ids; the same at every call."""
    stream = ids(rows, most)
    drawn = np.random.default_rng(0)
    while True:
        starts = drawn.integers(0, len(stream) - length, count)
        yield np.stack([stream[start : start + length] for start in starts])
