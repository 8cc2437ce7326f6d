"""Progress of tokenizing: a bar on a terminal, a plain line now and then in a log, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_SECONDS = 10.0

Report = Callable[[int, int], None]  # Called with the characters and tokens that have just been written.


@contextmanager
def silent() -> Iterator[Report]:
    """Says nothing."""
    yield lambda characters, tokens: None


@contextmanager
def console(total_bytes: int | None) -> Iterator[Report]:
    """A bar where standard error is a terminal, else lines. `total_bytes` is the size of the text, None where unknown."""
    if not sys.stderr.isatty():
        yield lines(total_bytes)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(), TextColumn("tokenizing"), BarColumn(),
        TextColumn("{task.fields[tokens]:,} tokens, {task.fields[rate]:.2f} Mtok/s"), TimeRemainingColumn(),
    )  # fmt: skip
    begun, counted = time.monotonic(), 0
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total_bytes, tokens=0, rate=0.0)

        def report(characters: int, tokens: int) -> None:
            nonlocal counted
            counted += tokens
            bar.update(task, advance=characters, tokens=counted, rate=counted / (time.monotonic() - begun + 1e-9) / 1e6)

        yield report


def lines(total_bytes: int | None) -> Report:
    """A line every `LINE_SECONDS`, the first after that long."""
    begun = last = time.monotonic()
    done = counted = 0

    def report(characters: int, tokens: int) -> None:
        nonlocal last, done, counted
        done, counted, now = done + characters, counted + tokens, time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            share = f"{100 * done / total_bytes:.0f} % " if total_bytes else ""
            print(
                f"data: {share}{counted:,} tokens, {counted / (now - begun) / 1e6:.2f} Mtok/s",
                file=sys.stderr,
                flush=True,
            )

    return report
