"""Text columns and Markdown tables from the same cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Row = Sequence[str]


def aligned(rows: Sequence[Row]) -> list[str]:
    """Align the first column left, the others right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def markdown(rows: Sequence[Row]) -> list[str]:
    """Return a Markdown table; the first row is the header."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return [lines[0], "|" + " --- |" + " ---: |" * (len(rows[0]) - 1), *lines[1:]]


def ratio(found: Mapping[str, float] | None) -> tuple[str, str]:
    """Return median and quartiles of a ratio as text."""
    return ("n/a", "") if found is None else (f"{found['median']:.3f}", f"{found['q1']:.3f} - {found['q3']:.3f}")
