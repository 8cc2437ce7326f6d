"""Bytes in words, the same everywhere."""

from __future__ import annotations

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def bytes_in_words(count: float | None) -> str:
    """`3.41 GiB`, `812 MiB`, `24 KiB`, or n/a where the number of bytes is not known."""
    if count is None:
        return "n/a"
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    return f"{count / KIB:.0f} KiB" if 0 < count < MIB else f"{count / MIB:.0f} MiB"
