"""Result types of checks: figures, rows to print, and findings with their cost and fix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Weight = Literal["stops", "costs", "minor"]
WEIGHTS: tuple[Weight, ...] = ("stops", "costs", "minor")
"""Worst first: training cannot start or would be wrong; training is slower; a note."""
UNKNOWN = "n/a"


@dataclass(frozen=True)
class Finding:
    """A problem (`what`) and its fix (`mend`). It `stops` training, `costs` speed, or is `minor`.

    `costs` describes the effect, `n/a` if it was never measured; `source` names the measurement.
    """

    what: str
    mend: str
    weight: Weight
    costs: str = UNKNOWN
    source: str = ""


@dataclass(frozen=True)
class Check:
    """Result of one check. `rows` are printed beside `name`, `figures` go into the JSON unchanged."""

    name: str
    rows: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the check as JSON values."""
        return asdict(self)


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Sort by weight, stable within a weight."""
    return sorted(findings, key=lambda finding: WEIGHTS.index(finding.weight))
