"""The metrics of a run for Python and notebooks: columns of metrics.jsonl, and a small table with the losses as a picture."""

from __future__ import annotations

import base64
import html
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptoughts.console import count, duration
from gptoughts.run.tracking.jsonl import read
from gptoughts.run.tracking.loss_plot import draw_losses


def columns(metrics: Path) -> dict[str, list[Any]]:
    """Return key -> its value in every row of a metrics.jsonl, in step order; None where a row does not have it."""
    rows = read(metrics)
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: [row.get(key) for row in rows] for key in keys}


def losses_png(metrics: Path, title: str) -> bytes | None:
    """Return the picture of the losses; None if no loss was logged."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "loss.png"
        draw_losses(metrics, picture, title.replace("$", r"\$"))
        return picture.read_bytes() if picture.is_file() else None


def summary_html(title: str, figures: Mapping[str, str], metrics: Path) -> str:
    """Return a table of `figures` and the losses as an inline picture, for `_repr_html_`. Texts are escaped."""
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in figures.items())
    png = losses_png(metrics, title)
    inline = base64.b64encode(png).decode() if png else ""
    image = f'<img alt="losses" style="max-width:640px" src="data:image/png;base64,{inline}">' if png else ""
    return f"<b>{html.escape(title)}</b><table>{rows}</table>{image}"


def last(history: Mapping[str, list[Any]], key: str) -> Any:
    """Return the newest value of a column; None if there is none."""
    return next((value for value in reversed(history.get(key, [])) if value is not None), None)


def figures_of(history: Mapping[str, list[Any]]) -> dict[str, str]:
    """Return the newest figures of a run as texts: steps, tokens, time, losses, speed. Unknown ones are left out."""
    shown = {
        "steps": ("step", lambda value: f"{value:,}"),
        "tokens": ("train/num_tokens", count),
        "time in steps": ("train/seconds", duration),
        "training loss": ("train/loss", lambda value: f"{value:.4f}"),
        "validation loss": ("eval/loss", lambda value: f"{value:.4f}"),
        "tokens/s": ("perf/tokens_per_second", count),
    }
    newest = {name: (last(history, key), words) for name, (key, words) in shown.items()}
    return {name: words(value) for name, (value, words) in newest.items() if value is not None}
