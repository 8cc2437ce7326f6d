"""CPU time and memory of processes, from the real /proc and from odd ones."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from gptoughts.hardware.process_sampler import ProcessSampler

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux")


def test_a_busy_process_shows_its_cpu_time_and_memory() -> None:
    sampler = ProcessSampler([os.getpid()])
    began, used = time.perf_counter(), time.process_time()
    while time.process_time() - used < 0.3:
        sum(range(1000))
    values = sampler.read()[os.getpid()]
    expected = 100 * (time.process_time() - used) / (time.perf_counter() - began)
    assert values["process_percent"] == pytest.approx(expected, abs=15), "in ticks of 10 ms"
    assert 10e6 < values["process_bytes"] < 100e9
    node = sampler.node()
    assert node["load"] >= 0 and node["system_available_bytes"] > 1e6


def test_what_proc_does_not_tell_is_left_out(tmp_path: Path) -> None:
    sampler = ProcessSampler([7, 8], root=tmp_path)
    assert sampler.read() == {} and "system_available_bytes" not in sampler.node()
    (tmp_path / "proc" / "7").mkdir(parents=True)
    (tmp_path / "proc" / "7" / "stat").write_text("7 (a ) b) S " + " ".join(["0"] * 10) + " 30 20 0")
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   3 kB\n")
    assert sampler.read() == {7: {}}, "no share before a second reading, no memory without statm"
    assert sampler.node()["system_available_bytes"] == 3072
    assert sampler.read()[7]["process_percent"] == 0
