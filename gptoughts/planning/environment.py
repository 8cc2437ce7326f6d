"""Environment variables of a plan: merge them with those of the user, which win, and restart the process once to apply them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line imports this module at start-up, with or without a plan
    from gptoughts.planning.resolve import Plan

GUARD = "GPTOUGHTS_ENVIRONMENT_SET"
"""`PID:NAME,NAME`: the process that gptoughts restarted, and the variables it set there."""

SHORTAGE = "GPTOUGHTS_SHORTAGE"
"""Environment variable with a file into which a rank writes that it saved a smaller micro-batch, for the launcher to start the ranks again."""


class Process(Enum):
    """Owner of the process: our command line, which can be restarted with other variables, or a caller such as a notebook or test."""

    OURS = "ours"
    CALLERS = "caller's"


def in_effect(plan: Plan, environment: Mapping[str, str]) -> Plan:
    """Return the plan with the values in effect: variables set by the user override the plan's, with a note for each."""
    values, notes = dict(plan.environment), list(plan.notes)
    for name, value in plan.environment.items():
        current = environment.get(name, value)
        if current != value and _set_by_user(name, environment):
            values[name] = current
            notes.append(f"{name}={current} (set by you) overrides the plan's {name}={value}")
    from dataclasses import replace

    return replace(plan, environment=values, notes=tuple(notes))


def torch_is_loaded() -> bool:
    """Return whether torch is imported, so that changed variables would have no effect."""
    return "torch" in sys.modules


def missing_variables(plan: Plan, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the plan's variables that are not in effect in `environment` and that the user did not set."""
    return {
        name: value
        for name, value in plan.environment.items()
        if environment.get(name) != value and (name not in environment or not _set_by_user(name, environment))
    }


def restart(missing: Mapping[str, str]) -> None:
    """Re-execute this process with the missing variables, once; return if it was restarted already or nothing is missing.

    The process id stays the same, so a launcher such as torchrun keeps its child.
    """
    if not missing:
        return
    owner, ours = _guard(os.environ)
    if owner == os.getpid():
        os.environ.update(missing)  # the plan changed between the two starts; do not loop
        return
    guard = f"{os.getpid()}:{','.join(sorted({*ours, *missing}))}"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing, GUARD: guard})


def preset_guard(*names: str) -> str:
    """Return a value of GUARD for child processes: `names` count as set by gptoughts, and each child may still restart once."""
    return f"0:{','.join(names)}"


def _set_by_user(name: str, environment: Mapping[str, str]) -> bool:
    """Return whether a variable in `environment` was set by the user: not by gptoughts, and not as a default of torchrun."""
    if name in _guard(environment)[1]:
        return False
    # torchrun sets OMP_NUM_THREADS=1 for several ranks if it is unset: torch/distributed/run.py.
    return not (name == "OMP_NUM_THREADS" and environment.get(name) == "1" and "TORCHELASTIC_RUN_ID" in environment)


def _guard(environment: Mapping[str, str]) -> tuple[int | None, frozenset[str]]:
    owner, _, names = environment.get(GUARD, "").partition(":")
    return int(owner) if owner.isdecimal() else None, frozenset(name for name in names.split(",") if name)
