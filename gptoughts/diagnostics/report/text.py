"""The report as text, for a terminal: cautions, results, and what differs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gptoughts.console import duration, share
from gptoughts.diagnostics.report.differences import Difference, cautions, plan_differences, recipe_differences
from gptoughts.diagnostics.report.run_data import RunData
from gptoughts.diagnostics.report.summary import goodput_parts, results, step_parts

WIDEST = 60
"""Most characters of a column."""
CAUTION = "these losses are not comparable"


def comparison(runs: Sequence[RunData]) -> str:
    """Return cautions first, then results with the change from the first run, then differences of recipe and plan."""
    runs = list(runs)
    names = [run.name for run in runs]
    sections = [f"caution: {CAUTION}: {line}" for line in cautions(runs)]
    sections += [f"note: {run.name}: {line}" for run in runs for line in run.notes]
    changed = len(runs) > 1
    rows = [_with_changes(figure.texts(), figure.changes() if changed else [], figure.name) for figure in results(runs)]
    sections.append(_table("results", names, rows))
    for title, parts, shown in (
        ("step time, mean", [step_parts(run) for run in runs], lambda value: f"{1000 * value:.2f} ms"),
        ("wall time", [goodput_parts(run) for run in runs], duration),
    ):
        keys = dict.fromkeys(key for part in parts for key in part)
        totals = [sum(part.values()) for part in parts]
        rows = [
            [key.replace("_", " "), *(_part(part.get(key), total, shown) for part, total in zip(parts, totals, strict=True))]
            for key in keys
        ]
        sections += [_table(title, names, rows)] if rows else []
    for title, found in (("recipe", recipe_differences(runs)), ("plan", plan_differences(runs))):
        sections.append(_differences(title, names, found) if changed else "")
    return "\n\n".join(section for section in sections if section)


def _part(value: float | None, total: float, shown: object) -> str:
    if value is None or not callable(shown):
        return "n/a"
    return f"{shown(value)} ({share(value / total)})" if total > 0 else str(shown(value))


def _with_changes(texts: list[str], changes: list[str], name: str) -> list[str]:
    return [name, texts[0], *(f"{text}  {change}".rstrip() for text, change in zip(texts[1:], changes, strict=True))]


def _differences(title: str, names: Sequence[str], found: Iterable[Difference]) -> str:
    rows = [[one.name, *one.values] for one in found]
    return _table(f"{title}, what differs", names, rows) if rows else f"{title}: no difference"


def _table(title: str, names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [[_cell(cell) for cell in row] for row in [[title, *names], *rows]]
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cell(text: str) -> str:
    """Return printable text of one line: names and settings come from files."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return line if len(line) <= WIDEST else f"{line[: WIDEST - 3]}..."
