"""What a run says while it trains: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

import os
import sys
from typing import Any, Literal, TextIO

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


class Console:
    """Prints rows as they come. On a terminal the newest row stays at the bottom, elsewhere each is a line of its own."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._open = False

    @property
    def style(self) -> Literal["color", "brackets"]:
        """How marked text is shown: in color on a terminal that wants it, else in brackets."""
        return "color" if self._live and "NO_COLOR" not in os.environ else "brackets"

    def say(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        print(text, file=self._stream, flush=True)

    def row(self, text: str) -> None:
        """The state of the run: replaced by the next row on a terminal, kept in a log."""
        if self._live:
            self._clear()
            print(text, end="", file=self._stream, flush=True)
            self._open = True
        else:
            print(text, file=self._stream, flush=True)

    def _clear(self) -> None:
        if self._open:
            print("\r\x1b[2K", end="", file=self._stream)
            self._open = False


class SilentConsole(Console):
    """Says nothing: for ranks that do not write."""

    def say(self, text: str) -> None:
        """Nothing."""

    def row(self, text: str) -> None:
        """Nothing."""


def aside(text: str) -> None:
    """A line that stays, from a place that holds no console; a live row gives way to it and comes back with the next."""
    live = sys.stdout.isatty()
    print(f"\r\x1b[2K{text}" if live else text, flush=True)


def duration(seconds: float) -> str:
    """`7 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def count(value: float) -> str:
    """`950`, `12.3 k`, `4.56 M`, `1.2 B`."""
    for limit, word in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if value >= limit:
            return f"{value / (1e3 if word == ' k' else limit):.3g}{word}"
    return f"{value:.0f}"


def share(value: Any) -> str:
    """A share in per cent, or n/a where it is not known."""
    return "n/a" if value is None else f"{100 * value:.1f} %"


def bytes_in_words(count: float | None) -> str:
    """`3.41 GiB`, `812 MiB`, `24 KiB`, or n/a where the number of bytes is not known."""
    if count is None:
        return "n/a"
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    return f"{count / KIB:.0f} KiB" if 0 < count < MIB else f"{count / MIB:.0f} MiB"
