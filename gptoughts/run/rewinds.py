"""Rewinds of a run: after a bad step it goes on from its last checkpoint, and passes over the data up to that step.

`rewinds.json` in the run folder records each, so that a run that is killed afterwards passes over the same data.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gptoughts.data.batches import Cursor
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.progress import Progress
from gptoughts.files import load_json
from gptoughts.run.storage import write_record
from gptoughts.run.tracking.run_dir import RunFolder

FILE = "rewinds.json"


@dataclass(frozen=True)
class Start:
    """Where a run begins after its rewinds."""

    progress: Progress = field(default_factory=Progress)
    rewinds: int = 0
    """Rewinds up to there."""
    line: str = ""
    """Words about the data that are passed over; empty where none are."""


def start_after(folder: RunFolder | None, ranks: Ranks, progress: Progress, fingerprint: str, passed: int | None) -> Start:
    """Return where a run begins that has reached `progress`, on every rank. A collective.

    passed       samples up to which a new rewind passes over the data; None where there is none. It is recorded.
    fingerprint  of the data, for the cursor
    """
    if folder is None:
        return Start(progress)
    out = folder.out
    first = progress.cursor.samples if progress.cursor is not None else 0
    found = ""
    if ranks.first:
        kept = [one for one in _read(out / FILE) if one["step"] <= progress.step]
        if passed is not None:
            kept.append({"step": progress.step, "samples": first, "passed": passed})
            write_record(out / FILE, kept)
        here = [one for one in kept if (one["step"], one["samples"]) == (progress.step, first)]
        found = f"{len(kept)} {here[-1]['passed'] if here else first}"
    count, last = map(int, ranks.texts(found)[0].split())
    if last == first:
        return Start(progress, count)
    line = f"samples {first} to {last - 1} of the data order are passed over, after {count} rewind{'s' if count > 1 else ''}"
    return Start(replace(progress, cursor=Cursor(last, fingerprint)), count, line)


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the records; none for a file that is missing or damaged, after which the run meets the bad step again."""
    try:
        found = load_json(path)
        return [{key: int(one[key]) for key in ("step", "samples", "passed")} for one in found]
    except (OSError, ValueError, KeyError, TypeError):
        return []
