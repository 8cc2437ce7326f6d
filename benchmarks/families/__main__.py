"""Run the comparison of model types with plain transformers, and write its record and its table.

    python -m benchmarks.families --out docs/measurements/cpu/families.json [TYPE ...]
    python -m benchmarks.families --table docs/measurements/cpu/families.json    # rewrites the table of docs/models.md

Each type runs in a process of its own, so that one that aborts or hangs costs its own row only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.families.compare import examine
from benchmarks.families.tiny import KINDS

DEADLINE = 300.0
"""Seconds after which a type counts as failed."""
_FORK = multiprocessing.get_context("fork")


def sweep(kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the records of `kinds`, in their order."""
    records = []
    for kind in kinds:
        begin = time.perf_counter()
        record = _alone(kind)
        records.append(record)
        seconds = time.perf_counter() - begin
        print(f"{kind:28} {record['state']:10} {record.get('stage', ''):10} {seconds:6.1f} s  {record['reason'][:300]}", flush=True)
    return records


def _alone(kind: str) -> dict[str, Any]:
    """Return the record of `kind`, examined in a child process."""
    reader, writer = _FORK.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="families-") as folder:
        child = _FORK.Process(target=_examine, args=(kind, Path(folder) / "model", writer), daemon=True)
        child.start()
        writer.close()
        try:
            record: dict[str, Any] = reader.recv() if reader.poll(DEADLINE) else _failed(kind, f"no result in {DEADLINE:g} s")
        except EOFError:
            child.join()
            record = _failed(kind, f"its process ended with exit code {child.exitcode}")
        child.kill()
        child.join()
    return record


def _failed(kind: str, reason: str) -> dict[str, Any]:
    return {"type": kind, "state": "failed", "reason": reason}


def _examine(kind: str, folder: Path, writer: Connection) -> None:
    writer.send(examine(kind, folder))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="TYPE", help="model types; all causal types of transformers if none is given")
    parser.add_argument("--out", type=Path, help="write the record there, as JSON")
    given = parser.parse_args(arguments)
    records = sweep(tuple(given.kinds) or KINDS)
    return 0 if all(record["state"] not in ("different", "failed") for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
