"""Draw bench figures: bars with spread for layers, loss curves for parity, lines for scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoughts.diagnostics.bench.curves import smoothed, window_of
from gptoughts.diagnostics.bench.gains import BASELINE, PLAN, with_, without
from gptoughts.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE_COLOR, PLAN_COLOR, BAR_COLOR = "#9aa0a6", "#1a73e8", "#7baaf7"
EDGES = {BASELINE: BASELINE_COLOR, PLAN: PLAN_COLOR}


def draw_layers(runs: Sequence[Mapping[str, Any]], picture: Path) -> None:
    """Draw two panels per run: tokens per second of the plan without each layer and of the baseline with each, with quartiles."""
    most = max(len(run["parts"]) for run in runs) + 2
    figure, rows = _figure(len(runs), 2, (12, 0.42 * most * len(runs) + 1.2 * len(runs)))
    for run, (left, right) in zip(runs, rows, strict=True):
        layers = run["parts"].values()
        _bars(left, run, [PLAN, *map(without, layers), BASELINE], PLAN)
        _bars(right, run, [BASELINE, *map(with_, layers), PLAN], BASELINE)
        limit = max(left.get_xlim()[1], right.get_xlim()[1])
        for axes, words in ((left, "the plan without each layer"), (right, "the baseline with each layer")):
            axes.set(xlim=(0, limit))
            axes.set_title(f"{run['recipe']}: {words}", fontsize=10)
    figure.suptitle(runs[-1]["machine"]["label"], fontsize=9)
    _saved(figure, picture)


def _bars(axes: Axes, run: Mapping[str, Any], names: Sequence[str], end: str) -> None:
    tokens = run["tokens_per_step"] * 1000
    for place, name in enumerate(names):
        row = run["variants"].get(run["same_as"].get(name, name), {})
        if "step_ms" not in row:
            why = "not counted" if name not in run["left_out"] else "cannot run"
            axes.text(0, place, f" {why}", va="center", fontsize=8, color="#b3261e")
            continue
        times = row["step_ms"]
        speed, low, high = tokens / times["median"], tokens / times["q3"], tokens / times["q1"]
        axes.barh(
            place, speed, color=EDGES.get(name, BAR_COLOR), height=0.7,
            xerr=[[speed - low], [high - speed]], error_kw={"elinewidth": 1, "capsize": 3, "ecolor": "#3c4043"},
        )  # fmt: skip
    ends = run["variants"].get(end, {})
    if "step_ms" in ends:
        axes.axvline(tokens / ends["step_ms"]["median"], color=EDGES[end], linewidth=1, linestyle="--")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second, median; whiskers are quartiles over rounds", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def draw_parity(run: Mapping[str, Any], picture: Path) -> None:
    """Draw the smoothed losses of plan, reference and other seeds; below, plan - reference and the limit."""
    figure, rows = _figure(2, 1, (9, 6.5))
    (above,), (below,) = rows
    per_step = run["tokens_per_step"]
    curves = {
        name: smoothed([math.nan if one is None else one for one in values], window_of(len(values)))
        for name, values in run["losses"].items()
    }
    for name, curve in curves.items():
        tokens = [per_step * step for step in range(1, len(curve) + 1)]
        known = {"plan": (PLAN_COLOR, 1.8), "reference": ("#3c4043", 1.4)}
        color, width = known.get(name, (BASELINE_COLOR, 0.8))
        above.plot(tokens, curve, color=color, linewidth=width, label=name)
    above.set(ylabel="loss, smoothed (nats per token)", title=f"{run['recipe']}: {', '.join(run['in_question'].values())}")
    above.legend(fontsize=8)
    pairs = zip(curves.get("plan", []), curves.get("reference", []), strict=False)
    distance = [100 * (one - other) / other for one, other in pairs]
    below.plot([per_step * step for step in range(1, len(distance) + 1)], distance, color=PLAN_COLOR, linewidth=1.4)
    for sign in (1, -1):
        below.axhline(sign * 100 * run["limit"], color="#b3261e", linewidth=1, linestyle="--")
    below.set(xlabel="tokens", ylabel="plan - reference, %")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    _saved(figure, picture)


def draw_scaling(run: Mapping[str, Any], picture: Path) -> None:
    """Draw speed-up and efficiency over ranks, one line per kind and strategy with quartiles over rounds; dashed is linear speed-up."""
    figure, ((left, right),) = _figure(1, 2, (11, 4.6))
    lines: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in run["arms"].values():
        if row["ranks"] > 1 and "speed_up" in row:
            lines.setdefault((row["kind"], row["strategy"]), []).append(row)
    most = max(row["ranks"] for row in run["arms"].values())
    left.plot([1, most], [1, most], color=BASELINE_COLOR, linewidth=1, linestyle="--", label="linear")
    right.axhline(1, color=BASELINE_COLOR, linewidth=1, linestyle="--")
    for (kind, strategy), rows in lines.items():
        for axes, key in ((left, "speed_up"), (right, "efficiency")):
            found = [row[key] for row in rows]
            below = [0, *(one["median"] - one["q1"] for one in found)]
            above = [0, *(one["q3"] - one["median"] for one in found)]
            ranks, values = [1, *(row["ranks"] for row in rows)], [1, *(one["median"] for one in found)]
            style = "o-" if kind == "strong" else "s:"
            axes.errorbar(ranks, values, yerr=[below, above], fmt=style, capsize=3, label=f"{strategy}, {kind}")
    for axes, name in ((left, "speed-up in tokens per second"), (right, "efficiency")):
        axes.set(xlabel="ranks", ylabel=name, ylim=(0, None), xticks=sorted({row["ranks"] for row in run["arms"].values()}))
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    threads = run["threads_per_rank"]
    figure.suptitle(f"{run['recipe']}, threads per rank: {threads}; {run['machine']['label']}", fontsize=9)
    _saved(figure, picture)


def _figure(rows: int, columns: int, inches: tuple[float, float]) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _saved(figure: Figure, picture: Path) -> None:
    with replacing(picture) as temporary:
        figure.savefig(temporary, dpi=110)
