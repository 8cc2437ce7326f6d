"""Reduce a curve of any length to a bounded number of points without losing a spike: minimum and maximum of every window stay."""

from __future__ import annotations

from typing import NamedTuple


class Point(NamedTuple):
    """One value of a curve."""

    number: int
    """Position in the full curve."""
    x: float
    y: float


class Window(NamedTuple):
    """The lowest and the highest point of consecutive points."""

    low: Point
    high: Point


class Curve:
    """A curve of which at most `2 * most` windows are held. Points are added in order; every value must be finite.

    A window holds `width` consecutive points. When the windows become too many, neighbors are merged and the width doubles, so memory is
    bounded and no length has to be known before. The lowest and the highest value of every window, the first and the last point are kept.
    """

    def __init__(self, most: int) -> None:
        self.most = max(1, most)
        self.width = 1
        self.first: Point | None = None
        self._windows: list[Window] = []
        self._closed = 0
        self._xs: list[float] = []
        self._ys: list[float] = []

    def __len__(self) -> int:
        """Return how many points were added."""
        return self._closed + len(self._ys)

    def add(self, x: float, y: float) -> None:
        """Append one point."""
        self._xs.append(x)
        self._ys.append(y)
        if len(self._ys) >= self.width:
            self._close()

    @property
    def last(self) -> Point | None:
        """The last point, None if there is none."""
        return Point(len(self) - 1, self._xs[-1], self._ys[-1]) if self._ys else self._last

    _last: Point | None = None

    def _close(self) -> None:
        if self.first is None:
            self.first = Point(0, self._xs[0], self._ys[0])
        self._windows.append(self._window())
        self._last = self.last
        self._closed += len(self._ys)
        self._xs, self._ys = [], []
        if len(self._windows) >= 2 * self.most:
            self._widen()

    def _window(self) -> Window:
        low, high = self._ys.index(min(self._ys)), self._ys.index(max(self._ys))
        return Window(*(Point(self._closed + place, self._xs[place], self._ys[place]) for place in (low, high)))

    def _widen(self) -> None:
        pairs = zip(self._windows[::2], self._windows[1::2], strict=True)  # their number is even: 2 * most
        self._windows = [_merged(one, other) for one, other in pairs]
        self.width *= 2

    def points(self, most: int | None = None) -> list[Point]:
        """Return the kept points in order: those of at most `2 * most` windows, where fewer are wanted than are held."""
        windows = [*self._windows, *([self._window()] if self._ys else [])]
        while most is not None and len(windows) > 2 * max(1, most):
            pairs = [windows[start : start + 2] for start in range(0, len(windows), 2)]
            windows = [_merged(pair[0], pair[-1]) for pair in pairs]
        ends = [point for point in (self.first, self.last) if point is not None]
        kept = {point.number: point for window in windows for point in window} | {point.number: point for point in ends}
        return [kept[number] for number in sorted(kept)]


def _merged(one: Window, other: Window) -> Window:
    return Window(min(one.low, other.low, key=_value), max(one.high, other.high, key=_value))


def _value(point: Point) -> float:
    return point.y
