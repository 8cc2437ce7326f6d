"""Start the ranks of `gptoughts train` on this machine with torchrun's launcher, and start them again after out-of-memory."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from gptoughts.console import print_line
from gptoughts.planning.environment import GUARD, SHORTAGE, preset_guard

AGAIN = 5
"""Restarts with a smaller micro-batch: from 32 sequences down to 1."""


def launch(ranks: int, words: Sequence[str], environment: Mapping[str, str], resumes: bool) -> int:
    """Run `gptoughts WORDS` in `ranks` processes and return the exit code of the first one that failed, 0 without a failure.

    environment  variables of the plan, set where the user set none
    resumes      whether the run has a name, so that it continues after out-of-memory instead of starting over
    """
    from gptoughts.engine.distributed.elastic import run_ranks

    with tempfile.TemporaryDirectory(prefix="gptoughts-") as folder:
        shortage = Path(folder) / "shortage"
        with _environment({**_missing(environment), SHORTAGE: str(shortage), "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT"}):
            for again in range(AGAIN, -1, -1):
                code = run_ranks(ranks, words)
                if code == 0 or not shortage.exists() or not resumes or again == 0:
                    break
                shortage.unlink()
                print_line("out of memory; restarting with the smaller micro-batch", sys.stderr)
    return code


def _missing(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the thread count of the plan, marked as ours, so that a rank that needs another one can still change it."""
    name = "OMP_NUM_THREADS"
    if name in os.environ or name not in environment:
        return {}
    return {name: environment[name], GUARD: preset_guard(name)}


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
