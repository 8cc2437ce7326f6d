"""What a check says: figures, rows to print, and findings, each with its cost and the line that mends it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Weight = Literal["stops", "costs", "minor"]
WEIGHTS: tuple[Weight, ...] = ("stops", "costs", "minor")
"""Worst first: training cannot start or would be wrong; it is slower than it could be; a note."""
UNKNOWN = "n/a"


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be, and what to type. It `stops` training, `costs` speed, or is `minor`.

    `costs` says what is lost in words, `n/a` where nobody has measured it; `source` says who has.
    """

    what: str
    mend: str
    weight: Weight
    costs: str = UNKNOWN
    source: str = ""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `rows` are printed beside `name`, `figures` go into the JSON as they are."""

    name: str
    rows: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return asdict(self)


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """By weight; in the order of the checks within one."""
    return sorted(findings, key=lambda finding: WEIGHTS.index(finding.weight))
