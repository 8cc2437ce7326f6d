"""Send a signal inside a named part of a training, not at a system call: `python -c 'from tests.faults.points import main; main()' ORDER train ...`.

ORDER is POINT:CALL:MS[:SIGNAL[+SIGNAL]]. The process gets SIGKILL, or the signals given, a tenth of a second apart, MS milliseconds after the
start of the CALLth call of POINT; 0: before the call does anything. FAULTS_LOG gets `point NAME`, the part that the signal really struck,
which may be a later one; for another signal than SIGKILL also `at SECONDS`, when it was sent, on the monotonic clock.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
import threading
import time
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


class _Sender:
    def __init__(self, order: str) -> None:
        self.point, call, milliseconds, *names = order.split(":")
        self.calls_left, self.seconds = int(call), int(milliseconds) / 1000
        self.signals = [signal.Signals[name] for name in (names[0] if names else "SIGKILL").split("+")]
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
        if self.seconds or len(self.signals) > 1:
            threading.Thread(target=self._send, daemon=True).start()
        else:
            self._send()

    def _send(self) -> None:
        time.sleep(self.seconds)
        struck = self.inside[-1] if self.inside else "between two parts"
        at = "" if signal.SIGKILL in self.signals else f"at {time.monotonic()}\n"
        file = os.open(os.environ["FAULTS_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(file, f"point {struck}\n{at}".encode())
        for number, name in enumerate(self.signals):
            time.sleep(0.1 if number else 0)
            os.kill(os.getpid(), name)


def install(order: str) -> None:
    """Wrap every point; `order` says where to send which signal."""
    sender = _Sender(order)
    for name, place in POINTS.items():
        module, _, path = place.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, last = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, last, sender.wrap(name, getattr(owner, last)))


def main() -> None:
    """Run gptoughts with the words after the first, which is the order."""
    order, *words = sys.argv[1:]
    install(order)
    sys.argv = ["gptoughts", *words]
    from gptoughts.cli.main import main as run

    run()
