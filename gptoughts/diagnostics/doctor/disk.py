"""Measure the disk of the run folder with one unnamed file of bounded size, which disappears with the process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptoughts.console import GIB
from gptoughts.diagnostics.doctor.finding import Check, Finding
from gptoughts.diagnostics.doctor.forks import Job, Outcome

SIZE_BYTES, BLOCK_BYTES = 256 << 20, 4 << 20
MOST_SECONDS = 3.0
# Weights and two moments in float32.
BYTES_PER_PARAMETER = 12
# At this rate a checkpoint of a billion parameters takes two minutes, in which training waits.
LEAST_WRITE_MB_S = 100.0


def jobs(folder: Path) -> list[Job]:
    """Return the job; it runs alone."""
    return [Job("disk", __name__, "child", (str(folder),), 30.0, "disk")]


def child(folder: str) -> dict[str, Any]:
    """Write up to 256 MB into `folder` and read them back, bypassing the page cache; return MB/s and `cache`, the method."""
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            return _rates(file.fileno())
    except OSError as error:
        return {"error": f"{error.strerror or error}"}


def _rates(number: int) -> dict[str, Any]:
    """Measure the open file `number`."""
    import mmap
    import os
    from time import perf_counter

    block = mmap.mmap(-1, BLOCK_BYTES)  # O_DIRECT requires whole pages
    block.write(os.urandom(BLOCK_BYTES))
    into = mmap.mmap(-1, BLOCK_BYTES)
    written, began = 0, perf_counter()
    while written < SIZE_BYTES and perf_counter() - began < MOST_SECONDS:
        written += os.write(number, block)
    os.fsync(number)
    write_seconds = perf_counter() - began
    cache, read, wrong, began = _past_the_cache(number), 0, 0, perf_counter()
    while read + BLOCK_BYTES <= written and perf_counter() - began < MOST_SECONDS:
        got = os.preadv(number, [into], read) if hasattr(os, "preadv") else into.write(os.pread(number, BLOCK_BYTES, read))
        wrong += got != BLOCK_BYTES or into[:] != block[:]
        into.seek(0)
        read += BLOCK_BYTES
    read_seconds = perf_counter() - began
    return {
        "written_mb": written / 1e6, "write_mb_s": written / 1e6 / write_seconds,
        "read_mb_s": read / 1e6 / read_seconds if read else None, "cache": cache, "wrong_blocks": wrong,
    }  # fmt: skip


def _past_the_cache(number: int) -> str:
    """Bypass the page cache for the following reads: `avoided`, `asked to forget`, or `not avoided`."""
    import fcntl
    import os

    if hasattr(os, "O_DIRECT"):
        try:
            fcntl.fcntl(number, fcntl.F_SETFL, fcntl.fcntl(number, fcntl.F_GETFL) | os.O_DIRECT)
            return "avoided"
        except OSError:  # not supported by memory and some network file systems
            pass
    if hasattr(fcntl, "F_NOCACHE"):
        fcntl.fcntl(number, fcntl.F_NOCACHE, 1)
        return "avoided"
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        return "asked to forget"
    return "not avoided"


def judge(folder: Path, outcome: Outcome | None, free_bytes: int | None) -> Check:
    """Return the rates of `folder`, and findings if it is slow, wrong or not writable."""
    if outcome is None:
        return Check("disk")
    elsewhere = "gptoughts train --run-dir FOLDER_ON_ANOTHER_DISK"
    if outcome.trouble:
        what = f"{folder}: not writable: {outcome.trouble}"
        return Check("disk", (), (Finding(what, elsewhere, "stops"),), {"error": outcome.trouble})
    figures, findings = outcome.figures or {}, []
    write, read = figures["write_mb_s"], figures["read_mb_s"]
    if figures["wrong_blocks"]:
        findings.append(Finding(f"{folder}: bytes read differ from bytes written", elsewhere, "stops", "wrong checkpoints"))
    if write < LEAST_WRITE_MB_S:
        seconds = BYTES_PER_PARAMETER * 1e9 / 1e6 / write
        lost = f"{seconds:.0f} s per checkpoint of a billion parameters"
        findings.append(
            Finding(f"{folder}: writes {write:.0f} MB/s", elsewhere, "minor", lost, "arithmetic: 12 bytes per parameter")
        )
    reads = "n/a" if read is None else f"{read:,.0f} MB/s"
    how = {"avoided": "page cache bypassed", "asked to forget": "page cache possibly included"}.get(
        figures["cache"], "page cache included"
    )
    note = "" if free_bytes is None or free_bytes > GIB else ", nearly full"
    return Check("disk", (f"writes {write:,.0f} MB/s, reads {reads} ({how}){note}",), tuple(findings), figures)
