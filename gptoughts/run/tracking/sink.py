"""Sinks: where metrics, samples, files and the end of a run are sent. One file per sink; SINKS is the registry.

`jsonl` writes at once and is the source. Every other sink runs on a thread of its own behind a bounded queue, so that one that is slow or
hangs never delays a step; what its queue has no room for is dropped and counted.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoughts.console import LOGGER
from gptoughts.errors import ConfigError, nearest

if TYPE_CHECKING:
    from gptoughts.engine.callback import Callback

SINKS = {
    "jsonl": "gptoughts.run.tracking.jsonl:Jsonl",
    "plot": "gptoughts.run.tracking.loss_plot:LossPlot",
    "tensorboard": "gptoughts.run.tracking.tensorboard:TensorBoard",
    "wandb": "gptoughts.run.tracking.wandb:Wandb",
}
"""Sink name -> `module:class`. Add a tracker: one file with a subclass of Sink, and its line here."""
QUEUE_ROWS = 10_000
"""Rows that wait for a slow sink; later ones are dropped."""
CLOSE_SECONDS = 30.0
"""Longest time that the end of a run waits for all sinks together."""


@dataclass(frozen=True)
class RunInfo:
    """The run that a sink receives."""

    name: str
    out: Path
    """Run folder of plan.json, metrics.jsonl and plots."""
    attempt: int = 1
    """1 for the first start of the run, one more for every resume."""
    recipe: Mapping[str, Any] | None = None
    plan: Mapping[str, Any] | None = None
    run_id: str = ""
    """Name of the run at trackers; kept in the checkpoint, so that all attempts have the same."""
    step: int = 0
    """Step at which this attempt starts. Rows of earlier attempts after it are repeated."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The recipe's [track] table."""


class Sink:
    """Receives a run's metrics. Every method has a default that does nothing. Only the first rank has sinks."""

    immediate = False
    """Whether it is called by the training thread itself, without a queue. Its methods then must return at once."""

    def start(self, run: RunInfo) -> None:
        """Open files or connections for `run`."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Take one row of metrics; keys and units in `run/tracking/metrics.py`, unknown values are None."""

    def sample(self, index: int, values: Mapping[str, Any]) -> None:
        """Take one sample of the system metrics. `index` counts samples; `values["step"]` is the step of the time."""

    def text(self, step: int, name: str, text: str) -> None:
        """Take a generated text."""

    def artifact(self, path: Path) -> None:
        """Take a file that the run wrote, such as a plot."""

    def close(self) -> None:
        """Flush and close; also called when the run failed."""


class CallbackSink(Sink):
    """Forwards rows to `Callback.on_log`."""

    immediate = True

    def __init__(self, callback: Callback) -> None:
        self._callback = callback

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Call the callback."""
        self._callback.on_log(step, values)


class QueuedSink(Sink):
    """Runs a sink on a thread of its own. No method waits for the sink, except `close` until its deadline."""

    def __init__(self, sink: Sink, rows: int = QUEUE_ROWS) -> None:
        self._sink, self._name = sink, type(sink).__name__
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(rows)
        self._dropped = 0
        self._failed = self._ended = False
        self._thread = threading.Thread(target=self._work, name=f"tracker-{self._name}", daemon=True)

    def start(self, run: RunInfo) -> None:
        """Start the thread, and the sink on it."""
        self.put(lambda: self._sink.start(run))
        self._thread.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Queue a row."""
        self.put(lambda: self._sink.log(step, values))

    def sample(self, index: int, values: Mapping[str, Any]) -> None:
        """Queue a sample."""
        self.put(lambda: self._sink.sample(index, values))

    def text(self, step: int, name: str, text: str) -> None:
        """Queue a text."""
        self.put(lambda: self._sink.text(step, name, text))

    def artifact(self, path: Path) -> None:
        """Queue a file."""
        self.put(lambda: self._sink.artifact(path))

    def close(self) -> None:
        """Let the sink finish what is queued, for at most CLOSE_SECONDS."""
        self.close_by(time.monotonic() + CLOSE_SECONDS)

    def end(self, wait: float = 0.0) -> None:
        """Ask the sink to close when it has taken what is queued; wait for room in the queue."""
        if not self._ended and self._thread.is_alive():
            with suppress(queue.Full):
                self._calls.put(None, timeout=wait)
                self._ended = True

    def close_by(self, deadline: float) -> None:
        """Let the sink finish until `deadline` on the monotonic clock, then leave it behind. Reports rows that it did not take."""
        self.end(max(0.0, deadline - time.monotonic()))
        if self._thread.ident is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        lost = self._dropped + (self._calls.qsize() - self._ended if self._thread.is_alive() else 0)
        if self._thread.is_alive():
            LOGGER.warning("tracker %s does not answer and was left behind; rows not taken: %d", self._name, lost)
        elif lost and not self._failed:
            LOGGER.warning("tracker %s was too slow; rows dropped: %d (metrics.jsonl has all)", self._name, lost)

    def put(self, call: Callable[[], None]) -> None:
        """Queue a call for the sink's thread; drop and count it if there is no room."""
        if self._failed:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            if not self._dropped:
                LOGGER.warning("tracker %s is slow: its queue of %d rows is full", self._name, self._calls.maxsize)
            self._dropped += 1

    def _work(self) -> None:
        try:
            while (call := self._calls.get()) is not None:
                call()
            self._sink.close()
        except Exception as error:
            self._failed = True
            _report(self._name, error)
            with suppress(Exception):  # it failed already, and was reported
                self._sink.close()


class Sinks(Sink):
    """Several sinks as one. A sink that raises is reported once and left out; training goes on. Errors of callbacks are raised."""

    def __init__(self, sinks: Iterable[Sink] = ()) -> None:
        self._sinks = list(sinks)

    def start(self, run: RunInfo) -> None:
        """Start every sink."""
        self._each(lambda sink: sink.start(run))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send a row to every sink."""
        self._each(lambda sink: sink.log(step, values))

    def sample(self, index: int, values: Mapping[str, Any]) -> None:
        """Send a sample of the system metrics to every sink. Called by the sampler's thread."""
        self._each(lambda sink: sink.sample(index, values))

    def text(self, step: int, name: str, text: str) -> None:
        """Send a generated text to every sink."""
        self._each(lambda sink: sink.text(step, name, text))

    def artifact(self, path: Path) -> None:
        """Send a file to every sink."""
        self._each(lambda sink: sink.artifact(path))

    def close(self) -> None:
        """Close every sink; slow ones have CLOSE_SECONDS together."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for sink in self._sinks:
            if isinstance(sink, QueuedSink):
                sink.end()  # all of them finish at the same time
        self._each(lambda sink: sink.close_by(deadline) if isinstance(sink, QueuedSink) else sink.close())
        self._sinks.clear()

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:
                if isinstance(sink, CallbackSink):
                    raise  # the user's own code: its error is theirs to see
                with suppress(ValueError):  # the other thread left it out already
                    self._sinks.remove(sink)
                _report(type(sink).__name__, error)


def _report(name: str, error: Exception) -> None:
    LOGGER.warning("tracker %s failed and is off for the rest of the run: %s: %s", name, type(error).__name__, error)


def check_sinks(names: Iterable[str]) -> None:
    """Raise ConfigError for a name that is not in SINKS."""
    for name in names:
        if name not in SINKS:
            raise ConfigError(f"track: no tracker named {name!r}{nearest(name, SINKS)}", fix=f"one of {', '.join(SINKS)}")


def make_sinks(names: Iterable[str]) -> list[Sink]:
    """Return new sinks of names in SINKS, behind a queue unless they are immediate. `jsonl` is always the first: others read its files."""
    sinks: list[Sink] = []
    for name in dict.fromkeys(["jsonl", *names]):
        module, _, attribute = SINKS[name].partition(":")
        sink: Sink = getattr(import_module(module), attribute)()
        sinks.append(sink if sink.immediate else QueuedSink(sink))
    return sinks
