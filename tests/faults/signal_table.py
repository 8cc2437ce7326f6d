"""Signals in every phase of a training: exit code, seconds until the end, checkpoint, and the bits after resuming.

python -m tests.faults.signal_table --to docs/measurements/cpu/signals.json     also writes signals.md beside it
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tests.faults.harness import (
    SINGLE,
    VARIANTS,
    Fault,
    Life,
    Runs,
    Variant,
    hashes,
    heading,
    last,
    left_over,
    losses,
    prepare,
    same,
    steps_of,
)  # fmt: skip

LINES = 20_000
"""Lines of the text: validation then takes seconds."""
LONG = ("--eval.batches", "1000", "--sample.tokens", "300", "--sample.every", "6")
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGTERM+SIGTERM", "SIGINT+SIGINT")
_, COMPILED, DDP, _ = (replace(variant, words=(*variant.words, *LONG)) for variant in VARIANTS)
ALONE = replace(SINGLE, words=LONG)
UNCHECKED = replace(COMPILED, name="compiled-unchecked", words=(*COMPILED.words, "--numerics", "off"))
LIMIT = 10.0
"""Seconds between a signal and the end, at this size."""


@dataclass(frozen=True)
class Phase:
    """A part of a training, and where to send a signal in it: POINT:CALL:MILLISECONDS (see points.py)."""

    name: str
    order: str
    variant: Variant = ALONE
    stepped: bool = True
    """Whether steps came before, so that there is something to save."""
    cold: bool = False
    """Whether kernels are compiled anew."""
    resumed: bool = False
    """Whether the run was killed before, at step 5."""

    @property
    def title(self) -> str:
        """The name, with the number of ranks if there are several."""
        return self.name if self.variant.ranks == 1 else f"{self.name}, {self.variant.ranks} ranks"


PHASES = (
    Phase("tokenizing", "tokenizing:1:20", stepped=False),
    Phase("build", "build:1:0", stepped=False),
    Phase("numerics check", "numerics check:1:500", COMPILED, stepped=False, cold=True),
    Phase("compilation", "compilation:1:1000", UNCHECKED, stepped=False, cold=True),
    Phase("compilation for validation", "compilation:2:500", UNCHECKED, cold=True),
    Phase("first step", "step:1:0", stepped=False),
    Phase("watched step", "step:2:0"),
    Phase("training", "step:5:0"),
    Phase("validation", "evaluation:1:300"),
    Phase("sampling", "sampling:1:100"),
    Phase("writing a checkpoint", "snapshot:1:2"),
    Phase("restoring", "restore:1:0", stepped=False, resumed=True),
    Phase("end", "end:1:0"),
    Phase("build", "build:1:0", DDP, stepped=False),
    Phase("numerics check", "numerics check:1:10", DDP, stepped=False),
    Phase("training", "step:5:0", DDP),
    Phase("validation", "evaluation:1:300", DDP),
    Phase("sampling", "sampling:1:100", DDP),
    Phase("writing a checkpoint", "snapshot:1:2", DDP),
)


@dataclass(frozen=True)
class Cell:
    """What a signal in a phase led to."""

    phase: str
    signals: str
    struck: list[str]
    codes: list[int]
    seconds: float
    checkpoint: int | None
    """Step of the newest checkpoint that was left."""
    bits: bool
    """Whether the run that went on reached the losses and weights of the unbroken one."""
    faults: list[str]
    """What was not as promised."""


def expected_codes(phase: Phase, signals: str) -> set[int]:
    """Return the exit codes that a signal may end with; 0 where training is complete already."""
    return {128 + signal.Signals[signals.partition("+")[0]], *([0] if phase.name == "end" else [])}


def try_cell(runs: Runs, phase: Phase, signals: str) -> Cell:
    """Send signals to all ranks of a run in a phase, look at what is left, and let the run go on to its end."""
    place = runs.folder / "run"
    for old in (place, runs.folder / "run-cache", runs.folder / "kernels"):
        shutil.rmtree(old, ignore_errors=True)
    variables = {"TORCHINDUCTOR_CACHE_DIR": str(runs.folder / "kernels")} if phase.cold else {}
    everywhere = range(phase.variant.ranks)
    if phase.resumed:
        runs.run_ranks(place, phase.variant, [Fault("", "step:5:0", rank, at_point=True) for rank in everywhere])
    orders = [Fault("", f"{phase.order}:{signals}", rank, at_point=True) for rank in everywhere]
    life = runs.run_ranks(place, phase.variant, orders, variables=variables)
    sent = [float(line.removeprefix("at ")) for line in life.struck if line.startswith("at ")]
    struck = sorted({line.removeprefix("point ") for line in life.struck if line.startswith("point ")})
    seconds = life.ended - max(sent) if sent else -1.0
    newest = max(steps_of(place), default=None) if (place / "checkpoints").is_dir() else None
    left = left_over(place)
    after = runs.run_ranks(place, phase.variant, variables=variables)
    bits = not any(after.codes) and same(place, reference(runs, phase.variant))
    faults = list(_faults(phase, signals, life, seconds, newest))
    faults += [f"left over: {left}"] if left else []
    faults += [] if bits else [f"other bits, or {after.codes}: {after.said[-2000:]}"]
    return Cell(phase.title, signals, struck, life.codes, round(seconds, 2), newest, bits, faults)


def _faults(phase: Phase, signals: str, life: Life, seconds: float, newest: int | None) -> Iterator[str]:
    if seconds < 0:
        yield f"no signal was sent: {life.said[-2000:]}"
    if seconds > LIMIT:
        yield f"{seconds:.1f} s"
    if not set(life.codes) <= expected_codes(phase, signals):
        yield f"exit codes {life.codes}: {life.said[-2000:]}"
    if "Traceback" in life.said:
        yield f"traceback: {life.said[-2000:]}"
    if phase.stepped and "+" not in signals and newest is None:
        yield "no checkpoint"


def reference(runs: Runs, variant: Variant) -> Path:
    """Return the folder of the unbroken run of a variant; made once."""
    place = runs.folder / f"unbroken-{variant.name}"
    if not last(place).is_dir():
        life = runs.run_ranks(place, variant)
        assert not any(life.codes) and losses(place) and hashes(last(place)), life.said
    return place


def to_markdown(cells: Iterable[Cell], command: str) -> str:
    """Return a table with a row per phase and a column per signal: exit code, seconds, step of the checkpoint."""
    found = {(cell.phase, cell.signals): cell for cell in cells}
    lines = [
        "# Signals in every phase", "", f"Made by `{command}`. In a cell: exit code, seconds from the last signal to the end of the last rank,",
        "step of the newest checkpoint (-: no step was made before). Every run was continued, and made the losses and weights of an unbroken one",
        "unless the cell says otherwise.", "",
        f"| signal in | {' | '.join(name.replace('+', ', ') for name in SIGNALS)} |", f"| --- |{' --- |' * len(SIGNALS)}",
    ]  # fmt: skip
    for phase in dict.fromkeys(name for name, _ in found):
        texts = [_cell_text(found[phase, name]) if (phase, name) in found else "" for name in SIGNALS]
        lines.append(f"| {phase} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _cell_text(cell: Cell) -> str:
    codes = "/".join(str(code) for code in dict.fromkeys(cell.codes))
    return f"{codes}, {cell.seconds:.1f} s, {cell.checkpoint or '-'}{' **not as promised**' if cell.faults else ''}"


def main() -> None:
    """Parse the command line, fill the table, keep it; exit with 1 if a cell is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, help="file for the record; the table goes beside it")
    parser.add_argument("--phase", help="only phases with this name")
    given = parser.parse_args()
    signal.signal(
        signal.SIGHUP, signal.SIG_DFL
    )  # nohup ignores it, and a shell's background job SIGINT: children would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory(prefix="signals-") as folder:
        runs = prepare(Path(folder), LINES)
        for phase in (phase for phase in PHASES if given.phase in (None, phase.name)):
            for signals in SIGNALS:
                cells.append(try_cell(runs, phase, signals))
                print(
                    f"{phase.title}, {signals}: {_cell_text(cells[-1])} {cells[-1].struck} {cells[-1].faults or ''}", flush=True
                )
    command = "python -m tests.faults.signal_table"
    record: dict[str, Any] = {
        **heading(command),
        "limit_seconds": LIMIT, "cells": [asdict(cell) for cell in cells],
    }  # fmt: skip
    if given.to:
        given.to.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        given.to.with_suffix(".md").write_text(to_markdown(cells, command), encoding="utf-8")
    raise SystemExit(any(cell.faults for cell in cells))


if __name__ == "__main__":
    main()
