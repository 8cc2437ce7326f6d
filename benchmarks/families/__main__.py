"""Compare model types with plain transformers; write the record and the table of a page.

    python -m benchmarks.families --to docs/measurements/cpu/families.json --table docs/models.md   # all types
    python -m benchmarks.families llama mamba                                                       # two types, printed only
    python -m benchmarks.families --from docs/measurements/cpu/families.json --table docs/models.md # the table of a record

With types, `--to` replaces the rows of those types in the record. Each type runs in a process of its own, so that one that aborts or hangs
costs its own row only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.families.compare import examine
from benchmarks.families.table import rewrite, states
from benchmarks.families.tiny import KINDS
from gptoughts.files import write_json
from gptoughts.hardware.machine import probe

DEADLINE = 300.0
"""Seconds after which a type counts as failed."""
WRONG = ("different", "failed")
"""States that are an error of ours."""
_FORK = multiprocessing.get_context("fork")


def sweep(kinds: tuple[str, ...]) -> dict[str, Any]:
    """Return the record of `kinds`."""
    rows, begin = [], time.perf_counter()
    for kind in kinds:
        began = time.perf_counter()
        row = _alone(kind)
        rows.append(row)
        seconds = time.perf_counter() - began
        print(f"{kind:28} {row['state']:10} {row.get('stage', ''):10} {seconds:6.1f} s  {row['reason'][:300]}", flush=True)
    return {
        "command": "python -m benchmarks.families --to docs/measurements/cpu/families.json",
        "machine": probe().label(), "torch": torch.__version__, "transformers": transformers.__version__,
        "seconds": round(time.perf_counter() - begin), "types": rows,
    }  # fmt: skip


def _alone(kind: str) -> dict[str, Any]:
    """Return the row of `kind`, examined in a child process."""
    reader, writer = _FORK.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="families-") as folder:
        child = _FORK.Process(target=_examine, args=(kind, Path(folder) / "model", writer), daemon=True)
        child.start()
        writer.close()
        try:
            row: dict[str, Any] = reader.recv() if reader.poll(DEADLINE) else _failed(kind, f"no result in {DEADLINE:g} s")
        except EOFError:
            child.join()
            row = _failed(kind, f"its process ended with exit code {child.exitcode}")
        child.kill()
        child.join()
        row["reason"] = row["reason"].replace(folder, "FOLDER")
    return row


def _failed(kind: str, reason: str) -> dict[str, Any]:
    return {"type": kind, "state": "failed", "reason": reason}


def _examine(kind: str, folder: Path, writer: Connection) -> None:
    writer.send(examine(kind, folder))


def _read(path: Path) -> dict[str, Any]:
    """Return the record at `path`."""
    run: dict[str, Any]
    (run,) = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return run


def _merged(path: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Return the record at `path` with the rows of `run` in place of its own."""
    old = _read(path)
    new = {row["type"]: row for row in run["types"]}
    return {**old, "types": [new.get(row["type"], row) for row in old["types"]]}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns 1 if a type is different or failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.families", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "kinds", nargs="*", metavar="TYPE", help="model types; all causal types of transformers if none is given"
    )
    parser.add_argument("--from", dest="record", type=Path, metavar="FILE", help="read this record and examine nothing")
    parser.add_argument("--to", type=Path, help="write the record there, as JSON")
    parser.add_argument("--table", type=Path, help="rewrite the table of this page")
    given = parser.parse_args(arguments)
    run = _read(given.record) if given.record else sweep(tuple(given.kinds) or KINDS)
    print(", ".join(f"{sum(row['state'] == state for row in run['types'])} {state}" for state in states(run["types"])))
    if given.to:
        run = _merged(given.to, run) if given.kinds and given.to.exists() else run
        write_json(given.to, {"runs": [run]})
    if given.table:
        rewrite(given.table, run)
    return 0 if all(row["state"] not in WRONG for row in run["types"]) else 1


if __name__ == "__main__":
    sys.exit(main())
