"""Kill the process inside a named part of a training, not at a system call: `python -c 'from tests.faults.points import main; main()' POINT:CALL:MS train ...`.

The process gets SIGKILL MS milliseconds after the start of the CALLth call of POINT; 0: before the call does anything. FAULTS_LOG gets
`point NAME`, the part that the kill really struck, which may be a later one.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

POINTS = {
    "tokenizing": "gptoughts.data.text.job:Job.run",
    "build": "gptoughts.run.session:build_engine",
    "numerics check": "gptoughts.run.numerics_check:compare",
    "compilation": "torch._inductor.compile_fx:compile_fx",
    "restore": "gptoughts.engine.checkpoint.state:restore",
    "loader": "gptoughts.data.batches:read_batch",
    "step": "gptoughts.engine.trainer:train_step",
    "optimizer": "gptoughts.engine.engine:Engine.step",
    "evaluation": "gptoughts.run.callbacks:Evaluate.on_step",
    "sampling": "gptoughts.run.callbacks:Sample.on_step",
    "snapshot": "gptoughts.engine.checkpoint.state:snapshot",
    "end": "gptoughts.run.run:_Run._close",
}
"""Name -> module and function, or class and method."""


class _Killer:
    def __init__(self, order: str) -> None:
        self.point, call, milliseconds = order.rsplit(":", 2)
        self.calls_left, self.seconds = int(call), int(milliseconds) / 1000
        self.inside: list[str] = []

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            self.inside.append(name)
            try:
                if name == self.point:
                    self.calls_left -= 1
                    if self.calls_left == 0:
                        self._arm()
                return function(*arguments, **named)
            finally:
                self.inside.pop()

        return wrapped

    def _arm(self) -> None:
        if self.seconds:
            timer = threading.Timer(self.seconds, self._kill)
            timer.daemon = True
            timer.start()
        else:
            self._kill()

    def _kill(self) -> None:
        struck = self.inside[-1] if self.inside else "between two parts"
        file = os.open(os.environ["FAULTS_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(file, f"point {struck}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)


def install(order: str) -> None:
    """Wrap every point; `order` says where to kill."""
    killer = _Killer(order)
    for name, place in POINTS.items():
        module, _, path = place.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, last = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, last, killer.wrap(name, getattr(owner, last)))


def main() -> None:
    """Run gptoughts with the words after the first, which says where to kill."""
    order, *words = sys.argv[1:]
    install(order)
    sys.argv = ["gptoughts", *words]
    from gptoughts.cli.main import main as run

    run()
