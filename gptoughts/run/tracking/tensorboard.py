"""TensorBoard: event files in OUT/tensorboard, and a run `system` below it with the system metrics, whose axis counts samples.

Every attempt writes them anew: what earlier attempts recorded comes from the JSON lines, so no step is missing or doubled, whatever a kill
left behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptoughts.console import Redactor
from gptoughts.run.tracking.figures import numbers_and_texts
from gptoughts.run.tracking.jsonl import replay
from gptoughts.run.tracking.sink import RunInfo, Sink

FOLDER, SYSTEM_FOLDER = "tensorboard", "system_metrics"
FLUSH_SECONDS = 10
"""Longest time until a row can be seen."""


class TensorBoard(Sink):
    """Writes scalars and texts."""

    def __init__(self) -> None:
        self._redact = Redactor()
        self._writers: dict[str, Any] = {}
        self._shown: dict[str, str] = {}
        """Newest text of each key, which is written again only when it changes."""

    def start(self, run: RunInfo) -> None:
        """Open the event files and fill them. Raises OSError for a folder that cannot be written."""
        from torch.utils.tensorboard import SummaryWriter

        for name, folder in (("run", run.out / FOLDER), ("samples", run.out / FOLDER / SYSTEM_FOLDER)):
            _remove_events(folder)
            # A TensorBoard that shows the run drops what it read of earlier files at the purge.
            self._writers[name] = SummaryWriter(
                str(folder), purge_step=0 if run.attempt > 1 else None, flush_secs=FLUSH_SECONDS
            )
        replay(run, self)
        self._flush()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write a row."""
        numbers, texts = numbers_and_texts(values)
        for key, value in numbers.items():
            self._writers["run"].add_scalar(key, value, step)
        for key, text in texts.items():
            if self._shown.get(key) != text:
                self._shown[key] = text
                self._writers["run"].add_text(key, self._redact(text), step)

    def sample(self, index: int, values: Mapping[str, Any]) -> None:
        """Write a sample at its own time."""
        for key, value in numbers_and_texts(values)[0].items():
            self._writers["samples"].add_scalar(key, value, index, walltime=values.get("time"))
        self._flush()

    def text(self, step: int, name: str, text: str) -> None:
        """Write a generated text as a block without formatting."""
        block = "\n".join(f"    {line}" for line in self._redact(text).split("\n"))
        self._writers["run"].add_text(f"samples/{name}", block, step)

    def close(self) -> None:
        """Close the event files."""
        for writer in self._writers.values():
            writer.close()

    def _flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()


def _remove_events(folder: Path) -> None:
    for file in folder.glob("events.out.tfevents.*"):
        file.unlink()
