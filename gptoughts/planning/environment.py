"""Environment variables that a plan needs: they count only before the library that reads them starts. What the user set wins."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line imports this module before it knows whether a plan is needed
    from gptoughts.planning.resolve import Plan

GUARD = "GPTOUGHTS_ENVIRONMENT_SET"
"""`PID:NAME,NAME`: the variables that gptoughts itself set, and the process that it started again with them."""


class Process(Enum):
    """Whose process this is: one that may be started again with other variables, or a notebook or test that only calls us."""

    OURS = "ours"
    CALLERS = "caller's"


def in_effect(plan: Plan, environment: Mapping[str, str]) -> Plan:
    """The plan with the values that will hold here: a variable that the user set differently wins, and a note says so."""
    values, notes = dict(plan.environment), list(plan.notes)
    for name, value in plan.environment.items():
        here = environment.get(name, value)
        if here != value and _is_the_users(name, environment):
            values[name] = here
            notes.append(f"{name}={here} was set by you and wins; the plan wanted {name}={value}")
    return replace(plan, environment=values, notes=tuple(notes))


def torch_is_loaded() -> bool:
    """Whether torch has read its variables already, so that what a plan wants of them would come too late."""
    return "torch" in sys.modules


def lacking(plan: Plan, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of the plan that are not in effect in `environment` and that no user has set."""
    return {
        name: value
        for name, value in plan.environment.items()
        if environment.get(name) != value and (name not in environment or not _is_the_users(name, environment))
    }


def restart(missing: Mapping[str, str]) -> None:
    """Start this process again, as it was started, with the missing variables; once. Returns where it was done before.

    The process id stays the same, so a launcher such as torchrun keeps its child.
    """
    if not missing:
        return
    owner, ours = _guard(os.environ)
    if owner == os.getpid():
        os.environ.update(missing)  # the plan changed between two starts; a third would not end it
        return
    guard = f"{os.getpid()}:{','.join(sorted({*ours, *missing}))}"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **missing, GUARD: guard})


def _is_the_users(name: str, environment: Mapping[str, str]) -> bool:
    """Whether a variable that is there was set by the user: neither by gptoughts nor, as a default, by torchrun."""
    if name in _guard(environment)[1]:
        return False
    # torchrun sets OMP_NUM_THREADS=1 for several ranks where nobody set it: torch/distributed/run.py.
    return not (name == "OMP_NUM_THREADS" and environment.get(name) == "1" and "TORCHELASTIC_RUN_ID" in environment)


def _guard(environment: Mapping[str, str]) -> tuple[int | None, frozenset[str]]:
    owner, _, names = environment.get(GUARD, "").partition(":")
    return int(owner) if owner.isdecimal() else None, frozenset(name for name in names.split(",") if name)
