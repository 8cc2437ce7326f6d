"""Progress of tokenizing on standard error: a bar on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gptoughts.console import LOGGER

LINE_SECONDS = 10.0

Report = Callable[[int, int], None]
"""Called with the numbers of characters and tokens written since the last call."""


@contextmanager
def silent() -> Iterator[Report]:
    """Print nothing."""
    yield lambda characters, tokens: None


@contextmanager
def console(total_bytes: int | None) -> Iterator[Report]:
    """Show a bar if standard error is a terminal, else log lines. `total_bytes` is the size of the text, None where unknown."""
    if not LOGGER.isEnabledFor(logging.INFO) or not sys.stderr.isatty():
        yield log_lines(total_bytes)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(), TextColumn("tokenizing"), BarColumn(),
        TextColumn("{task.fields[tokens]:,} tokens, {task.fields[rate]:.2f} Mtok/s"), TimeRemainingColumn(),
    )  # fmt: skip
    start, total_tokens = time.monotonic(), 0
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total_bytes, tokens=0, rate=0.0)

        def report(characters: int, tokens: int) -> None:
            nonlocal total_tokens
            total_tokens += tokens
            rate = total_tokens / (time.monotonic() - start + 1e-9) / 1e6
            bar.update(task, advance=characters, tokens=total_tokens, rate=rate)

        yield report


def log_lines(total_bytes: int | None) -> Report:
    """Return a callback that logs at most one line per `LINE_SECONDS`."""
    start = last = time.monotonic()
    total_characters = total_tokens = 0

    def report(characters: int, tokens: int) -> None:
        nonlocal last, total_characters, total_tokens
        total_characters, total_tokens, now = total_characters + characters, total_tokens + tokens, time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            percent = f"{100 * total_characters / total_bytes:.0f} % " if total_bytes else ""
            rate = total_tokens / (now - start) / 1e6
            LOGGER.info("data: %s%s tokens, %.2f Mtok/s", percent, f"{total_tokens:,}", rate)

    return report
