"""Sinks: where metrics, files and the end of a run are sent. One file per sink; SINKS is the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from gptoughts.console import LOGGER
from gptoughts.engine.callback import Callback
from gptoughts.errors import ConfigError, nearest

SINKS = {
    "jsonl": "gptoughts.run.tracking.jsonl:Jsonl",
    "plot": "gptoughts.run.tracking.loss_plot:LossPlot",
}
"""Sink name -> `module:class`. Add a tracker: one file with a subclass of Sink, and its line here."""


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


class Sink:
    """Receives a run's metrics. Every method has a default that does nothing. Only the first rank has sinks."""

    def start(self, run: RunInfo) -> None:
        """Open files or connections for `run`."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Take one row of metrics; keys and units in `run/tracking/metrics.py`, unknown values are None."""

    def artifact(self, path: Path) -> None:
        """Take a file that the run wrote, such as a plot."""

    def close(self) -> None:
        """Flush and close; also called when the run failed."""


class CallbackSink(Sink):
    """Forwards rows to `Callback.on_log`."""

    def __init__(self, callback: Callback) -> None:
        self._callback = callback

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Call the callback."""
        self._callback.on_log(step, values)


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

    def artifact(self, path: Path) -> None:
        """Send a file to every sink."""
        self._each(lambda sink: sink.artifact(path))

    def close(self) -> None:
        """Close every sink."""
        self._each(lambda sink: sink.close())
        self._sinks.clear()

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:
                if isinstance(sink, CallbackSink):
                    raise  # the user's own code: its error is theirs to see
                self._sinks.remove(sink)
                LOGGER.warning(
                    "tracker %s failed and is off for the rest of the run: %s: %s",
                    type(sink).__name__,
                    type(error).__name__,
                    error,
                )


def check_sinks(names: Iterable[str]) -> None:
    """Raise ConfigError for a name that is not in SINKS."""
    for name in names:
        if name not in SINKS:
            raise ConfigError(f"track: no tracker named {name!r}{nearest(name, SINKS)}", fix=f"one of {', '.join(SINKS)}")


def make_sink(name: str) -> Sink:
    """Return a new sink of a name in SINKS."""
    module, _, attribute = SINKS[name].partition(":")
    sink: Sink = getattr(import_module(module), attribute)()
    return sink
