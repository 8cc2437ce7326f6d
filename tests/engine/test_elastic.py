"""The launcher of ranks waits for them: signals reach the ranks, and nothing ends the launcher while they save."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

LAUNCHER = """
import signal, subprocess, sys
from gptoughts import processes
from gptoughts.engine.distributed import elastic
processes.SIGNAL_SECONDS = 0.3
processes.CLOCK.start((signal.SIGTERM,))
RANK = "import os, signal, sys, time; signal.signal(signal.{0}, lambda *_: (time.sleep(1.5), os.write(1, b'saved\\\\n'), sys.exit(0)));"
RANK += "os.write(1, b'ready\\\\n'); time.sleep(60)"
with elastic._forwarding() as received:
    code = subprocess.Popen([sys.executable, "-c", RANK.format(sys.argv[1])]).wait()
assert not processes.CLOCK.excused(), "as before"
print(code, received, flush=True)
"""


@pytest.mark.parametrize(("number", "received"), [(signal.SIGTERM, [15]), (signal.SIGUSR2, [])])
def test_a_rank_saves_as_long_as_it_takes(number: signal.Signals, received: list[int]) -> None:
    """SIGUSR2 asks for a checkpoint, so the job does not end by it."""
    with subprocess.Popen([sys.executable, "-c", LAUNCHER, number.name], stdout=-1, text=True) as launcher:
        assert launcher.stdout is not None and launcher.stdout.readline() == "ready\n"
        launcher.send_signal(number)
        said, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0 and said == f"saved\n0 {received}\n"
