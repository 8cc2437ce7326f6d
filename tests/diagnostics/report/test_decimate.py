"""No spike is lost: minimum and maximum of every window of a decimated curve stay."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gptoughts.diagnostics.report.decimate import Curve
from tests.support.run_files import SPIKE

VALUES = st.lists(st.floats(-1e6, 1e6), max_size=400)


def decimated(values: list[float], most: int) -> Curve:
    curve = Curve(most)
    for x, y in enumerate(values):
        curve.add(10 * x, y)
    return curve


@given(VALUES, st.integers(1, 12))
def test_minimum_and_maximum_of_every_window_survive(values: list[float], most: int) -> None:
    curve = decimated(values, most)
    points = curve.points()
    for start in range(0, len(values), curve.width):
        window = values[start : start + curve.width]
        kept = [point.y for point in points if start <= point.number < start + curve.width]
        assert min(window) == min(kept) and max(window) == max(kept)
    assert len(curve) == len(values)
    assert all(values[point.number] == point.y and point.x == 10 * point.number for point in points)
    assert [point.number for point in points] == sorted({point.number for point in points})


@given(VALUES, st.integers(1, 12), st.integers(1, 12))
def test_the_number_of_points_is_bounded_and_the_ends_stay(values: list[float], most: int, fewer: int) -> None:
    curve = decimated(values, most)
    assert len(curve.points()) <= 4 * most + 2
    points = curve.points(fewer)
    assert len(points) <= 4 * fewer + 2
    if values:
        assert (points[0].y, points[-1].y) == (values[0], values[-1])
        assert curve.last is not None and curve.last.y == values[-1]
        assert (min(point.y for point in points), max(point.y for point in points)) == (min(values), max(values))


def test_one_spike_in_a_hundred_thousand_points_stays() -> None:
    values = [1.0] * 100_000
    values[71_234] = SPIKE
    points = decimated(values, 50).points()
    assert (712_340, SPIKE) in [(point.x, point.y) for point in points] and len(points) <= 202
