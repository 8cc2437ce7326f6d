"""Write the record of `benchmarks.families` as the table of a documentation page, between two markers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptoughts.errors import ConfigError

BEGIN, END = "<!-- families -->", "<!-- /families -->"
PACKED = {True: "yes", False: "no"}


def table(run: Mapping[str, Any]) -> str:
    """Return the markdown of a record: a line of totals, the types that are equal with their figures, and the others with their reason."""
    types = run["types"]
    equal = [row for row in types if row["state"] == "equal"]
    others = [row for row in types if row["state"] != "equal"]
    counts = ", ".join(f"{sum(row['state'] == state for row in types)} {state}" for state in states(types))
    versions = f"transformers {run['transformers']}, torch {run['torch']}, {run['machine']}"
    lines = [
        f"{versions}: {len(types)} types, {counts}, in {run['seconds'] / 60:.0f} minutes.",
        "",
        "| model type | attention | packs conversations | loss | gradient norm | logits | reloaded | greedy text |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_equal(row) for row in equal),
        "",
        "| model type | result | reason |",
        "| --- | --- | --- |",
        *(f"| `{row['type']}` | {row['state']} | {_cell(row['reason'])} |" for row in others),
    ]
    return "\n".join(lines)


def states(types: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the states that occur, `equal` first."""
    return sorted({row["state"] for row in types}, key=lambda state: (state != "equal", state))


def _equal(row: Mapping[str, Any]) -> str:
    figures = (row["loss_difference"], row["gradient_difference"], row["logits"], row["reloaded"])
    cells = (
        f"`{row['type']}`",
        row["attention"],
        PACKED[row["packs"]],
        *(f"{figure:.0e}" for figure in figures),
        row["generated"],
    )
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return " ".join(text.split("Try:")[0].split()).replace("|", "\\|").replace("<", "&lt;")


def rewritten(page: str, run: Mapping[str, Any]) -> str:
    """Return a page with the table of `run` between its markers. Raises ConfigError without markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"--table: the page has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table(run)}\n{END}{after}"


def rewrite(path: Path, run: Mapping[str, Any]) -> None:
    """Rewrite the table of the page at `path`."""
    path.write_text(rewritten(path.read_text(encoding="utf-8"), run), encoding="utf-8")
