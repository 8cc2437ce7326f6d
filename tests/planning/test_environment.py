"""Environment of a plan: put in place by one restart, what the user set wins and is told, a launcher's default does not."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gptoughts.hardware.machine import probe
from gptoughts.planning.environment import GUARD, in_effect, missing_variables
from gptoughts.planning.resolve import Plan
from tests.planning.test_resolve import planned

CORES = probe().cpu.usable_cores
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}

CHILD = """
import os, sys
import gptoughts.cli.train as train

def told(setting, *more, **job):
    assert "torch" not in sys.modules
    shown = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "PROBE", "GPTOUGHTS_ENVIRONMENT_SET")}
    print("trains", sys.argv[1:], shown, setting.plan.environment, flush=True)
    raise SystemExit(7)

train.train_resolved = told
print("starts", os.getpid(), flush=True)
from gptoughts.cli.main import main
main()
"""

PLUGIN = """
from contextlib import nullcontext
from gptoughts.planning.layer import Layer, active
LAYERS = [Layer("probe", "offload", "A probe.", lambda *_: nullcontext(), lambda *_: active(""), environment=lambda *_: {"PROBE": "a b"})]
"""


def run(tmp_path: Path, *words: str, **environment: str) -> list[str]:
    (tmp_path / "child.py").write_text(CHILD, encoding="utf-8")
    (tmp_path / "plugin.py").write_text(PLUGIN, encoding="utf-8")
    unset = ("OMP_NUM_THREADS", GUARD, "PROBE", *TORCHRUN)
    clean = {name: value for name, value in os.environ.items() if name not in unset}
    command = [sys.executable, "child.py", "train", "quickstart", *words]
    done = subprocess.run(
        command, cwd=tmp_path, env={**clean, **environment}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 7, done.stdout + done.stderr
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}  # of the plugin, as of any module
    assert left == {"child.py", "plugin.py"}
    return done.stdout.splitlines()


def test_one_restart_in_the_same_process(tmp_path: Path) -> None:
    lines = run(tmp_path, "--sample.prompt", "two words", "--plugin", "plugin.py", "--layer.offload", "probe")
    starts = [line for line in lines if line.startswith("starts")]
    assert len(starts) == 2 and starts[0] == starts[1], "the same process id, so that a launcher keeps its child"
    trains = lines[-1]
    assert f"'OMP_NUM_THREADS': '{CORES}'" in trains and "'PROBE': 'a b'" in trains and "'two words'" in trains
    assert sum(line.startswith("profile ") for line in lines) == 1, "the plan is printed once"


def test_what_the_user_set_wins_and_the_plan_says_so(tmp_path: Path) -> None:
    lines = run(tmp_path, OMP_NUM_THREADS=str(CORES + 5))
    assert sum(line.startswith("starts") for line in lines) == 1
    note = f"OMP_NUM_THREADS={CORES + 5} (set by you) overrides the plan's OMP_NUM_THREADS={CORES}"
    assert f"note: {note}" in lines and f"environment  OMP_NUM_THREADS={CORES + 5}" in lines
    assert f"'OMP_NUM_THREADS': '{CORES + 5}'" in lines[-1]


def test_under_torchrun_its_own_default_gives_way(tmp_path: Path) -> None:
    lines = run(tmp_path, **TORCHRUN, OMP_NUM_THREADS="1")
    assert f"'OMP_NUM_THREADS': '{CORES}'" in lines[-1]
    assert sum(line.startswith("starts") for line in lines) == (1 if CORES == 1 else 2)


def plan_with(**environment: str) -> Plan:
    return replace(planned("cpu"), environment=environment, notes=())


def test_lacking_and_in_effect() -> None:
    plan = plan_with(A="1", B="2")
    assert missing_variables(plan, {"A": "1"}) == {"B": "2"} and missing_variables(plan, {"A": "1", "B": "2"}) == {}
    assert missing_variables(plan, {"A": "9"}) == {"B": "2"}
    held = in_effect(plan, {"A": "9"})
    assert held.environment == {"A": "9", "B": "2"} and held.digest() != plan.digest()
    assert held.notes == ("A=9 (set by you) overrides the plan's A=1",)
    assert in_effect(plan, {}) == plan


def test_variables_that_a_parent_of_ours_set_are_not_the_users() -> None:
    plan, inherited = plan_with(A="1"), {GUARD: "1:A", "A": "9"}
    assert missing_variables(plan, inherited) == {"A": "1"} and in_effect(plan, inherited).environment == {"A": "1"}


@pytest.mark.parametrize("guard", ["", "junk", ":", "x:y:z"])
def test_a_strange_guard_is_no_guard(guard: str) -> None:
    assert missing_variables(plan_with(A="1"), {GUARD: guard, "A": "9"}) == {}
