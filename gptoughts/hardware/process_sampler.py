"""Sample CPU time and memory of processes, load and free memory of this node, from /proc. Unknown figures are left out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


class ProcessSampler:
    """Reads /proc. `root` contains proc/."""

    def __init__(self, processes: Iterable[int], root: Path = Path("/")) -> None:
        self._proc = root / "proc"
        self._before = {process: self._cpu_seconds(process) for process in processes}
        self._read_at = time.monotonic()

    def read(self) -> dict[int, dict[str, float]]:
        """Return by process: `process_percent` of one core since the last call, and `process_bytes` of resident memory."""
        now = time.monotonic()
        elapsed, self._read_at = now - self._read_at, now
        found = {}
        for process, before in self._before.items():
            after = self._cpu_seconds(process)
            if after is None:  # it ended, or belongs to another container
                continue
            values = self._resident(process)
            if before is not None and elapsed > 0:
                values["process_percent"] = 100 * (after - before) / elapsed
            self._before[process] = after
            found[process] = values
        return found

    def node(self) -> dict[str, float]:
        """Return `load`, the average over one minute, and `system_available_bytes`."""
        found = {}
        with suppress(OSError):
            found["load"] = os.getloadavg()[0]
        with suppress(OSError, ValueError, StopIteration):
            lines = (self._proc / "meminfo").read_text(encoding="ascii").splitlines()
            found["system_available_bytes"] = 1024.0 * int(next(line for line in lines if "MemAvailable" in line).split()[1])
        return found

    def _cpu_seconds(self, process: int) -> float | None:
        """Return user and system time of all threads; None if the process cannot be read."""
        try:
            text = (self._proc / str(process) / "stat").read_text(encoding="utf-8", errors="replace")
            user, system = text.rpartition(")")[2].split()[11:13]  # the name may hold spaces and parentheses
            return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):
            return None

    def _resident(self, process: int) -> dict[str, float]:
        with suppress(OSError, ValueError, IndexError):
            pages = int((self._proc / str(process) / "statm").read_text(encoding="ascii").split()[1])
            return {"process_bytes": float(pages * os.sysconf("SC_PAGE_SIZE"))}
        return {}
