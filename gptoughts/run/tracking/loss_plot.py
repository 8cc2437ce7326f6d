"""loss.png: training and validation loss over tokens, beside HellaSwag accuracies with published models as reference lines."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptoughts.files import replacing
from gptoughts.run.tracking.jsonl import FILE, read
from gptoughts.run.tracking.sink import RunInfo, Sink

MOST_SHARE = 0.005
"""Largest share of the time that is spent drawing: a long history is drawn less often."""


class Reference(NamedTuple):
    """A published HellaSwag accuracy, zero-shot on the whole validation split."""

    share: float
    label: str


WHOLE = 10_042
"""Rows of the validation split."""
CHANCE = 0.25
SCORES = {
    # acc_norm of lm-evaluation-harness, as karpathy/build-nanogpt reports it in hellaswag.py.
    "acc_norm": ("per character", Reference(0.3114, "GPT-2 124M 0.311 (lm-eval)")),
    # Table H.1 of Brown et al. 2020, which compares likelihoods per token (section 2.4).
    "acc_token": ("per token", Reference(0.337, "GPT-3 125M 0.337 (Brown et al. 2020)")),
}
"""Drawn score -> its normalization, and the reference with the same normalization."""
POINTS: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.5}


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
    """Draw the losses of `metrics` (a metrics.jsonl) into `picture`, beside HellaSwag if it was evaluated.

    Do nothing if no loss was logged.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read(metrics)
    train, val = series(rows, "train/loss"), series(rows, "eval/loss")
    if not train:
        return
    has_scores = any(series(rows, f"eval/hellaswag_{name}") for name in SCORES)
    figure = Figure(figsize=(14 if has_scores else 8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if has_scores else 1, squeeze=False)[0]
    axes[0].plot(*zip(*train, strict=True), linewidth=1.2, label=f"training (last {train[-1][1]:.3f})")
    if val:
        axes[0].plot(*zip(*val, strict=True), **POINTS, label=f"validation (last {val[-1][1]:.3f})")
    axes[0].set(xlabel="tokens", ylabel="loss (nats per token)", title=title)
    if has_scores:
        _draw_hellaswag(axes[1], rows)
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.legend()
    with replacing(picture) as temporary:
        figure.savefig(temporary, dpi=120)


def series(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return (tokens, value) of the rows that have a value for `key`."""
    return [(row["train/num_tokens"], row[key]) for row in rows if row.get(key) is not None and "train/num_tokens" in row]


def _draw_hellaswag(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the accuracies over tokens, with the chance level and, for the whole validation split, published models."""
    count = int(series(rows, "eval/hellaswag_rows")[-1][1])
    for name, (normalization, reference) in SCORES.items():
        points = series(rows, f"eval/hellaswag_{name}")
        if not points:
            continue
        (line,) = axes.plot(*zip(*points, strict=True), **POINTS, label=f"{name}, {normalization} (last {points[-1][1]:.3f})")
        if count == WHOLE:
            axes.axhline(reference.share, linestyle="--", linewidth=1, color=line.get_color(), label=reference.label)
    axes.axhline(CHANCE, linestyle=":", linewidth=1, color="gray", label=f"chance {CHANCE:g}")
    axes.set(xlabel="tokens", ylabel="share of rows answered correctly", title=f"HellaSwag, {count:,} rows")
