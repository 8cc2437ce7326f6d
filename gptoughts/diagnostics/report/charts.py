"""Decide which curves share a chart, with title, unit and definition, as plain data for the page's script."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from gptoughts.console import GIB, MIB
from gptoughts.diagnostics.report.decimate import Curve, Point
from gptoughts.diagnostics.report.run_data import MOST_WINDOWS, Key, RunData, Table
from gptoughts.diagnostics.report.summary import STEP_TIME
from gptoughts.run.tracking.metrics import METRICS

MOST_POINTS = 300_000
"""Points of all charts together, which are about 4 MB of the file."""
AXES = ("train/num_tokens", "train/seconds", "train/hours", "train/epoch", "training step")
"""Keys that are x-axes and get no chart."""
SECTIONS = {
    "loss": "Loss", "train": "Training", "perf": "Speed", "time": "Step time", "gpu": "GPU", "cpu": "CPU and memory",
    "memory": "CPU and memory", "eval": "Evaluation",
}  # fmt: skip
"""Prefix of a key -> section of the page; another prefix is its own section."""
ENDINGS = {
    "bytes_per_second": "bytes/s", "bytes": "bytes", "seconds": "s", "watts": "W", "celsius": "°C", "mhz": "MHz", "percent": "%",
    "joules": "J",
}  # fmt: skip
"""Ending of a key without an entry in the table of metrics -> unit."""
CAPITALS = ("gpu", "cpu", "mfu", "hfu", "tflops", "sm", "pcie", "gemm", "gc")
SPREAD = ("_min", "_max")
RANKS = ("_min_rank", "_max_rank")
"""Endings of the keys that name the rank of a minimum or maximum: listed in a table, not drawn."""
TICKS = 10
"""The wall clock is written in whole tenths of a second."""


@dataclass
class Line:
    """One curve of one run."""

    run: int
    label: str
    points: list[Point]
    role: str = "line"
    """line, marked (with a marker at each value), faint, low or high (the edges of a band)."""


@dataclass
class Chart:
    """Curves with one y-axis."""

    key: str
    title: str
    section: str
    unit: str = ""
    definition: str = ""
    clock: bool = False
    """x is the wall clock instead of the step."""
    lines: list[Line] = field(default_factory=list)
    largest: float = 0.0
    """Largest value of charts that shall have the same unit, at least."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data: x as differences of whole numbers, y in the unit of the axis with six digits."""
        unit, factor = _scaled(self.unit, [self.largest, *(point.y for line in self.lines for point in line.points)])
        ticks = TICKS if self.clock else 1
        lines = [
            {
                "run": line.run,
                "label": line.label,
                "role": line.role,
                "x": _deltas(round(point.x * ticks) for point in line.points),
                "y": [float(f"{point.y * factor:.6g}") for point in line.points],
            }
            for line in self.lines
        ]
        kept = {"key": self.key, "title": self.title, "unit": unit, "clock": self.clock}
        return {**kept, "lines": lines}


def make_charts(runs: list[RunData]) -> list[Chart]:
    """Return the charts of all runs in the order of the page, decimated to `MOST_POINTS` together."""
    charts = [*_loss(runs), *_step_times(runs), *_metrics(runs), *_system(runs)]
    drawn = [chart for chart in charts if any(len(line.points) > 1 for line in chart.lines)]
    lines = sum(len(chart.lines) for chart in drawn)
    most = max(8, min(MOST_WINDOWS, MOST_POINTS // (4 * max(1, lines))))
    for chart in drawn:
        for line in chart.lines:
            line.points = _thinned(line.points, most)
    order = list(dict.fromkeys(SECTIONS.values()))
    return sorted(drawn, key=lambda chart: order.index(chart.section) if chart.section in order else len(order))


def _thinned(points: list[Point], most: int) -> list[Point]:
    """Return points of at most `2 * most` windows, in the order of x."""
    curve = Curve(most)
    for point in points:
        curve.add(point.x, point.y)
    return sorted(curve.points(), key=lambda point: point.x)


def _loss(runs: list[RunData]) -> list[Chart]:
    chart = Chart("loss", "Training and validation loss", "Loss", "nats", "")
    kinds = (("train/loss", "training", "faint"), ("eval/loss", "validation", "marked"))
    chart.lines = [
        Line(number, kind, run.metrics.keys[key].curve.points(), role)
        for key, kind, role in kinds
        for number, run in enumerate(runs)
        if key in run.metrics.keys
    ]
    chart.definition = (
        "Training: mean over a global batch. Validation: mean over the validation split, on text that is not trained on."
    )
    return [chart]


def _step_times(runs: list[RunData]) -> list[Chart]:
    """Return one chart per run: the parts of its steps."""
    charts = []
    for number, run in enumerate(runs):
        keys = [key for key in run.metrics.keys if key.startswith(STEP_TIME)]
        title = "Parts of a step" if len(runs) == 1 else f"Parts of a step: {run.name}"
        chart = Chart(
            f"{STEP_TIME}{number}",
            title,
            "Step time",
            "s",
            "Time of a step on the first rank, by what it waits for or computes.",
        )
        chart.lines = [
            Line(number, key.removeprefix(STEP_TIME).replace("_", " "), run.metrics.keys[key].curve.points(), "part")
            for key in keys
        ]
        charts.append(chart)
    largest = max((point.y for chart in charts for line in chart.lines for point in line.points), default=0.0)
    for chart in charts:
        chart.largest = largest
    return charts


def _metrics(runs: list[RunData]) -> list[Chart]:
    apart = {"train/loss", "eval/loss", "eval/labels", *AXES}
    tables = [run.metrics for run in runs]
    keys = [key for key in _all_keys(tables) if key not in apart and not key.startswith(STEP_TIME) and not key.endswith(RANKS)]
    return [_chart(key, tables, clock=False) for key in keys]


def _system(runs: list[RunData]) -> list[Chart]:
    tables = [run.system for run in runs]
    keys = [key for key in _all_keys(tables) if key not in AXES and not key.endswith(RANKS)]
    return [_chart(key, tables, clock=True) for key in keys if not _is_spread(key, keys)]


def _all_keys(tables: Iterable[Table]) -> list[str]:
    return list(dict.fromkeys(key for table in tables for key in table.keys))


def _is_spread(key: str, keys: list[str]) -> bool:
    return any(key.endswith(ending) and key.removesuffix(ending) in keys for ending in SPREAD)


def _chart(key: str, tables: list[Table], clock: bool) -> Chart:
    """Return the chart of one key of every run, with its minimum and maximum over ranks as a band."""
    unit, definition = describe(key)
    chart = Chart(key, title_of(key), section_of(key), unit, definition, clock)
    marked = "marked" if key.startswith("eval/") else "line"
    for number, table in enumerate(tables):
        found: list[tuple[str, str, Key | None]] = [("", marked, table.keys.get(key))]
        if clock:
            found += [(role, role, table.keys.get(f"{key}_{ending}")) for role, ending in (("low", "min"), ("high", "max"))]
        labels = {"": "", "low": "lowest rank", "high": "highest rank"}
        chart.lines += [Line(number, labels[word], one.curve.points(), role) for word, role, one in found if one is not None]
    return chart


def title_of(key: str) -> str:
    """Return the title of a key's chart: its name in words, without a unit at its end, which the axis shows."""
    prefix, slash, name = key.partition("/")
    ending = next((ending for ending in ENDINGS if name.endswith(f"_{ending}")), None)
    name = name.removesuffix(f"_{ending}") if ending else name
    words = (name if slash else key).replace("_", " ")
    if prefix in ("cpu", "memory") and slash:  # they share a section
        words = f"{prefix} {words}"
    words = " ".join(word.upper() if word in CAPITALS else word for word in words.split(" "))
    return words[:1].upper() + words[1:]


def section_of(key: str) -> str:
    """Return the section of the page that a key belongs to."""
    prefix, slash, _ = key.partition("/")
    known = SECTIONS.get(prefix) if slash else None
    return known or (prefix[:60] if slash else "Other")


def describe(key: str) -> tuple[str, str]:
    """Return unit and definition of a key: from the table of metrics, else its unit by the ending of its name."""
    known = {metric.key: metric for metric in METRICS}
    base = key.rpartition(" ")[0] if key.endswith((" min", " mean", " max")) else key
    for name in (key, base):
        if name in known:
            return ("" if known[name].unit == "1" else known[name].unit), known[name].definition
    return next((unit for ending, unit in ENDINGS.items() if base.endswith(ending)), ""), ""


def _scaled(unit: str, values: list[float]) -> tuple[str, float]:
    """Return a readable unit and its factor: GiB for bytes, % for shares, ms for short times."""
    largest = max(map(abs, values), default=0.0)
    if unit == "bytes":
        return ("GiB", 1 / GIB) if largest >= GIB else ("MiB", 1 / MIB)
    if unit == "bytes/s":
        return ("GB/s", 1e-9) if largest >= 1e9 else ("MB/s", 1e-6)
    if unit == "share":
        return "%", 100.0
    if unit == "s" and largest < 1:
        return "ms", 1000.0
    return unit, 1.0


def _deltas(numbers: Iterable[int]) -> list[int]:
    found, before = [], 0
    for number in numbers:
        found.append(number - before)
        before = number
    return found


def axis_maps(run: RunData) -> dict[str, Any]:
    """Return what turns a step into tokens and hours of training, and the wall clock into a step: pairs of lists, x and y."""
    found = {}
    for name, table, key, ticks in (
        ("tokens", run.metrics, "train/num_tokens", 1),
        ("seconds", run.metrics, "train/seconds", 1),
        ("step", run.system, "training step", TICKS),
    ):
        curve = table.keys.get(key)
        points = sorted(_thinned(curve.curve.points(), MOST_WINDOWS // 4), key=lambda point: point.x) if curve else []
        if len(points) > 1:
            xs, ys = _deltas(round(point.x * ticks) for point in points), [float(f"{point.y:.9g}") for point in points]
            found[name] = {"x": xs, "y": ys}
    return found
