"""loss.png: training and validation loss over tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptoughts.files import replacing
from gptoughts.run.tracking.jsonl import FILE, read
from gptoughts.run.tracking.sink import RunInfo, Sink

MOST_SHARE = 0.005
"""Largest share of the time that is spent drawing: a long history is drawn less often."""


class LossPlot(Sink):
    """Draws loss.png from metrics.jsonl at each validation and when the run ends."""

    _run: RunInfo | None = None
    _next = 0.0

    def start(self, run: RunInfo) -> None:
        """Remember where the run writes."""
        self._run = run

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Draw the plot again if this is the row of a validation, and the last drawing is long enough ago."""
        if "eval/loss" in values and time.monotonic() >= self._next:
            self._draw()

    def close(self) -> None:
        """Draw the plot."""
        self._draw()

    def _draw(self) -> None:
        if self._run is None:
            return
        began = time.monotonic()
        draw_losses(self._run.out / FILE, self._run.out / "loss.png", self._run.name)
        ended = time.monotonic()
        self._next = ended + (ended - began) / MOST_SHARE


def draw_losses(metrics: Path, picture: Path, title: str) -> None:
    """Draw the losses of `metrics` (a metrics.jsonl) into `picture`; do nothing if no loss was logged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read(metrics)
    train = [(row["train/num_tokens"], row["train/loss"]) for row in rows if "train/loss" in row]
    val = [(row["train/num_tokens"], row["eval/loss"]) for row in rows if "eval/loss" in row]
    if not train:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), linewidth=1.2, label=f"training (last {train[-1][1]:.3f})")
    if val:
        axes.plot(*zip(*val, strict=True), marker="o", markersize=4, linewidth=1.5, label=f"validation (last {val[-1][1]:.3f})")
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(picture) as temporary:
        figure.savefig(temporary, dpi=120)
