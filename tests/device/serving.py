"""A child process that waits to be told how many steps to train, so that several can take turns on one GPU."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO

from tests.device.box import clocks

PR_SET_PDEATHSIG = 1
MARK = "@@ "
"""Begins every line that is meant for the parent."""


class Channel:
    """Lines of JSON to the parent and words from it. Whatever else the process prints goes to its log."""

    def __init__(self) -> None:
        _end_with_the_parent()
        self._out: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        sys.stdout = sys.stderr

    def say(self, values: dict[str, Any]) -> None:
        """One line to the parent."""
        self._out.write(MARK + json.dumps(values) + "\n")
        self._out.flush()

    def heard(self) -> int:
        """Steps to train next; 0 when there is no more to do. Waits."""
        line = sys.stdin.readline()
        return int(line) if line.strip() else 0


def _end_with_the_parent() -> None:
    """Linux ends this process with the one that started it: a child left behind would hold the GPU's memory and time."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def settle(device_type: str) -> None:
    """Wait for the GPU to be done with what was asked of it."""
    if device_type == "cuda":
        import torch

        torch.cuda.synchronize()


def timed(steps: int, device_type: str, run: Callable[[int], Any]) -> dict[str, Any]:
    """Seconds that `run(steps)` takes until the device is done, and the clocks right after."""
    settle(device_type)
    began = time.perf_counter()
    run(steps)
    settle(device_type)
    seconds = time.perf_counter() - began
    return {"steps": steps, "seconds": seconds, "clocks": clocks()}


def served(body: Callable[[dict[str, Any], Channel], None]) -> int:
    """Run `body` with the job that the command line carries; an error goes to the parent in one piece, and 1 is returned."""
    channel, job = Channel(), json.loads(sys.argv[1])
    try:
        body(job, channel)
    except Exception as error:
        lines = traceback.format_exc().splitlines()
        channel.say(
            {"failed": f"{type(error).__name__}: {error}"[:3000], "where": lines[-12:], "out_of_memory": _is_full(error)}
        )
        return 1
    return 0


def _is_full(error: Exception) -> bool:
    return type(error).__name__ in ("OutOfMemoryError", "AcceleratorError") and "memory" in str(error).lower()
