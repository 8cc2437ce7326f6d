"""Console output of a run, without secrets and control characters, and number formatting: bytes, durations, counts, shares."""

from __future__ import annotations

import atexit
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from io import TextIOWrapper
from types import TracebackType
from typing import Any, Literal, TextIO

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

LOGGER = logging.getLogger("gptoughts")
"""Where code without a console reports. Shown by a running console, or by the user's own handlers; otherwise silent."""
LOGGER.addHandler(logging.NullHandler())
NOISY_LOGGERS = ("torchao", "torch.utils._pytree")
"""Loggers of libraries that warn at import about kernels for other machines and about deprecations."""


HIDDEN = "[redacted]"
_SECRET_NAME = re.compile(
    r"(^|[_.\- ])((api|access|private|secret)[_\-]?key|key|token|secret|credentials?)$|passw(or)?d$|passphrase$", re.I
)
_NOT_SECRET = ("text_key", "mask_token")
"""Fields of a recipe whose names end as those of secrets do."""
_KNOWN = re.compile(r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_\-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}")
"""Forms of tokens that are secret wherever they stand."""
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s:]*:[^/@\s]+(?=@)")
SHORTEST = 6
"""Shorter values of variables are ordinary words too."""


def is_secret_name(name: str) -> bool:
    """Return whether a key or an environment variable of this name holds a secret."""
    return name.rpartition(".")[2] not in _NOT_SECRET and bool(_SECRET_NAME.search(name))


class Redactor:
    """Replaces secrets in text, lists and tables by `[redacted]`. Takes the secret variables of `environment` as they are now."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        secrets = {value for name, value in environment.items() if is_secret_name(name) and len(value) >= SHORTEST}
        words = [re.escape(value) for value in sorted(secrets, key=len, reverse=True)]
        self._pattern = re.compile("|".join([*words, _KNOWN.pattern, _IN_ADDRESS.pattern]))

    def __call__(self, value: Any) -> Any:
        """Return `value` without secrets; of a table, also without the texts of secret keys."""
        if isinstance(value, str):
            return self._pattern.sub(HIDDEN, value)
        if isinstance(value, Mapping):
            return {
                key: HIDDEN if isinstance(one, str) and is_secret_name(str(key)) else self(one) for key, one in value.items()
            }
        return [self(one) for one in value] if isinstance(value, list | tuple) else value


def redacted(value: Any) -> Any:
    """Return a text, list or table without secrets, also those of this process's environment: for all that is printed or saved."""
    return Redactor()(value)


COLORS = ("\x1b[32m", "\x1b[0m")
"""Begin and end of marked text on a terminal; the only control sequences that are printed."""
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
)
_PARTS = re.compile("|".join(f"({re.escape(code)})" for code in COLORS))


def escaped(text: str) -> str:
    """Return text that a terminal shows as it is: control characters as `\\x1b`, without newline and tab, bidirectional and invisible ones."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shown(text: str) -> str:
    """Return text as it is printed: redacted, escaped, with COLORS."""
    return "".join(part if part in COLORS else escaped(part) for part in _PARTS.split(redacted(text)) if part)


class Console:
    """Prints lines and one live row: on a terminal at the bottom, in a notebook as a bar. In a log every row is a line."""

    _level = logging.INFO

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._is_terminal = self._stream.isatty()
        self._notebook = _notebook_display() if self._stream is sys.stdout else None
        self._live: Any = None

    @property
    def style(self) -> Literal["color", "brackets"]:
        """How marked text is shown: in color on a terminal without NO_COLOR, else in brackets."""
        return "color" if self._is_terminal and "NO_COLOR" not in os.environ else "brackets"

    @property
    def is_live(self) -> bool:
        """Whether a row replaces the one before it."""
        return self._is_terminal

    def say(self, text: str) -> None:
        """Print lines that stay."""
        live = self._live
        if live is None or self._notebook:
            print_line(text, self._stream)
        else:
            _written(lambda: live.console.print(shown(text), markup=False, highlight=False, soft_wrap=True), self._stream)

    def row(self, *fields: str) -> None:
        """Show the state of the run: replaces the previous row on a terminal and in a notebook, a line of its own in a log.

        On a terminal the last fields are dropped where the row would be wider than a line.
        """
        if self._notebook is not None:
            output = {"text/plain": bar(fields[0]) + shown("  ".join(fields))}
            update = self._live.update if self._live is not None else partial(self._notebook, display_id=True)
            self._live = update(output, raw=True) or self._live
        elif not self._is_terminal:
            print_line("  ".join(fields), self._stream)
        else:
            _written(lambda: self._show(fields), self._stream)

    def _show(self, fields: tuple[str, ...]) -> None:
        from rich.console import Console as Terminal
        from rich.live import Live
        from rich.text import Text

        if self._live is None:
            terminal = Terminal(file=self._stream, highlight=False, soft_wrap=False)
            self._live = Live(
                console=terminal, auto_refresh=False, transient=False, redirect_stdout=False, redirect_stderr=False
            )
            self._live.start()
        kept = [escaped(redacted(field)) for field in fields]
        while len(kept) > 1 and len("  ".join(kept)) >= self._live.console.width:
            kept.pop()
        self._live.update(Text("  ".join(kept), no_wrap=True, overflow="ellipsis"), refresh=True)

    def end_row(self) -> None:
        """Leave the live row where it is; later output starts on a new line."""
        live, self._live = self._live, None
        if live is not None and self._notebook is None:
            _written(live.stop, self._stream)

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Print records of the logger `gptoughts` here, and on no other console, during the block; end the live row after it."""
        handler = _ConsoleHandler(self)
        others = [one for one in LOGGER.handlers if isinstance(one, _ConsoleHandler)]
        level = LOGGER.level
        LOGGER.setLevel(self._level)
        for one in others:
            LOGGER.removeHandler(one)
        LOGGER.addHandler(handler)
        try:
            yield
        finally:
            LOGGER.removeHandler(handler)
            for one in others:
                LOGGER.addHandler(one)
            LOGGER.setLevel(level)
            self.end_row()


def _notebook_display() -> Callable[..., Any] | None:
    """Return IPython's function that shows something in a notebook's cell; None elsewhere, also in IPython on a terminal."""
    ipython: Any = sys.modules.get("IPython")
    return ipython.display.display if ipython and type(ipython.get_ipython()).__name__ == "ZMQInteractiveShell" else None


def bar(field: str, width: int = 20) -> str:
    """Return a bar of the share done in a field such as `step 30/120`; nothing where there is no total."""
    done, _, total = field.rpartition(" ")[2].partition("/")
    filled = min(width, width * int(done) // int(total)) if done.isdigit() and total.isdigit() and int(total) else None
    return "" if filled is None else "█" * filled + "░" * (width - filled) + " "


class SilentConsole(Console):
    """Prints nothing: for `verbose=False` and ranks that do not write."""

    _level = logging.CRITICAL

    def say(self, text: str) -> None:
        """Print nothing."""

    def row(self, *fields: str) -> None:
        """Print nothing."""


def print_line(text: str, stream: TextIO | None = None) -> None:
    """Print lines to standard output or `stream`, escaped, because they hold names and text of files.

    Reports a failure once on standard error, and goes on.
    """
    target = stream or sys.stdout
    _written(lambda: print(shown(text), file=target, flush=True), target)


def print_result(text: str, end: str = "\n", raw: bool = False) -> None:
    """Print the result of a command to standard output, escaped. Raises OSError.

    `raw` is for generated text, JSON and files: as they are, but escaped on a terminal.
    """
    stream = sys.stdout
    whole = shown(text) if not raw else escaped(text) if stream.isatty() else text
    _encoded(lambda: print(whole, end=end, flush=True), stream)


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught exception as Python does, escaped: for sys.excepthook."""
    print_line("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), sys.stderr)


_told: set[str] = set()
"""Notes about output that were printed; each once per process."""


def _written(write: Callable[[], None], stream: TextIO) -> None:
    """Call `write`, and survive a full disk, a closed pipe and a closed stream."""
    try:
        _encoded(write, stream)
    except (OSError, ValueError) as error:
        _tell_once(f"warning: output cannot be written ({error}); work goes on without it")
        if isinstance(error, BrokenPipeError):
            _discard(stream)


def _encoded(write: Callable[[], None], stream: TextIO) -> None:
    """Call `write`; escape characters that the stream cannot encode."""
    try:
        write()
    except UnicodeEncodeError as error:
        if not isinstance(stream, TextIOWrapper):
            raise
        stream.reconfigure(errors="backslashreplace")
        _tell_once(f"note: the output's encoding is {error.encoding}; other characters are escaped")
        write()


def _tell_once(text: str) -> None:
    if text not in _told:
        _told.add(text)
        with suppress(OSError):
            os.write(2, f"{text}\n".encode())


def _discard(stream: TextIO) -> None:
    """Send what the stream still holds and what follows to the null device, for good."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def flush_output_at_exit() -> None:
    """Make the exit code ours: Python exits with 120 where it cannot flush standard output, as on a full disk."""

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                _discard(stream)

    atexit.register(flush)


def note(text: str) -> None:
    """Log a note; a running console prints it."""
    LOGGER.info("note: %s", text)


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.say(f"{'warning: ' if record.levelno >= logging.WARNING else ''}{record.getMessage()}")


class Progress:
    """Shows how much of a long evaluation is done: a live row on a terminal, a line per tenth in a log."""

    def __init__(self, console: Console, what: str) -> None:
        self._console, self._what, self._tenth = console, what, 0

    def __call__(self, done: int, total: int) -> None:
        """Show `done` of `total`."""
        tenth = 10 * done // max(1, total)
        if self._console.is_live or tenth > self._tenth:
            self._console.row(f"{self._what} {done:,}/{total:,}")
        self._tenth = tenth
        if done >= total:
            self._console.end_row()


def bytes_in_words(count: float | None) -> str:
    """Return `3.41 GiB`, `812 MiB`, `24 KiB`, or n/a for None."""
    if count is None or count >= GIB:
        return "n/a" if count is None else f"{count / GIB:.2f} GiB"
    return f"{count / KIB:.0f} KiB" if 0 < count < MIB else f"{count / MIB:.0f} MiB"


def duration(seconds: float) -> str:
    """Return `7 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def count(value: float) -> str:
    """Return `950`, `12.3 k`, `4.56 M`, `1.2 B`."""
    for limit, word in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if value >= limit:
            return f"{value / (1e3 if word == ' k' else limit):.3g}{word}"
    return f"{value:.0f}"


def share(value: Any) -> str:
    """Return a share as a percentage, or n/a for None."""
    return "n/a" if value is None else f"{100 * value:.1f} %"
