"""End a command: by an error with one message, by a signal N with one line and code 128 + N, until training handles signals by itself."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from gptoughts.console import print_line
from gptoughts.errors import GptoughtsError
from gptoughts.files import PATH_ERRORS
from gptoughts.planning.environment import Process
from gptoughts.processes import CLOCK

OF_THE_SYSTEM = {errno.ENAMETOOLONG: 2, errno.ENOSPC: 74, errno.EDQUOT: 74, errno.EIO: 74}
"""Errors of the operating system that any file can raise, and their exit codes: of wrong usage, and EX_IOERR."""
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Signals that Python does not handle by itself and that end a run."""
IGNORED = signal.SIGUSR2
"""Asks for a checkpoint, of which there is none before training."""


def end_at_signals() -> None:
    """Handle signals from now on, and those that were held back; inside another program do nothing.

    A signal that the process was started to ignore, as SIGHUP under nohup, stays ignored.
    """
    context = click.get_current_context(silent=True)
    if context is None or context.find_root().obj is not Process.OURS:
        return
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    if signal.getsignal(IGNORED) is signal.SIG_DFL:
        signal.signal(IGNORED, lambda number, frame: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*ENDING, IGNORED, signal.SIGINT))
    CLOCK.start((*ENDING, signal.SIGINT))


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold signals back during the block. If the process replaces itself in the block, the new program gets them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*ENDING, IGNORED, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(number: int, frame: Any) -> None:
    for other in ENDING:
        if signal.getsignal(other) is _end:
            signal.signal(other, _end_at_once)
    with suppress(OSError):
        os.write(2, f"ended by {signal.Signals(number).name}; saved checkpoints stay\n".encode())
    sys.exit(128 + number)  # what is open is undone now


def _end_at_once(number: int, frame: Any) -> None:
    os._exit(128 + number)


# --- one message


@contextmanager
def one_message(process: Process) -> Iterator[None]:
    """Print an error of the user or the system as one message and exit with its code: 2, or that of the error."""
    try:
        yield
    except click.ClickException as error:
        _exit(f"error: {error.format_message()}" if _prints(error.format_message()) else "", error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        _exit("interrupted", getattr(error.__cause__ or error, "code", 130))  # click replaces a KeyboardInterrupt by Abort
    except GptoughtsError as error:
        _exit(f"error: {error}" if str(error) and _prints(str(error)) else "", error.exit_code)
    except BrokenPipeError:
        # The reader of our output has exited; the interpreter must not flush into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if isinstance(error, OSError) and (error.errno in OF_THE_SYSTEM or (error.filename and error.errno in PATH_ERRORS)):
            named = f"{error.filename:.200}" if isinstance(error.filename, str) else "standard output"
            _exit(f"error: {named}: {error.strerror}", OF_THE_SYSTEM.get(error.errno or 0, 2))
        meeting = _meeting()
        if meeting is None or meeting.claim(f"{type(error).__name__}: {error}"):
            raise
        sys.exit(1)  # another rank prints the traceback
    finally:
        if process is Process.OURS:
            _end_at_once_from_now()


def _end_at_once_from_now() -> None:
    """Let a signal during the interpreter's exit end it without a traceback."""
    for number in (*ENDING, signal.SIGINT):
        if signal.getsignal(number) not in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(number, _end_at_once)


def _meeting() -> Any:
    """Return the store that this rank shares with the others, None before they met."""
    rendezvous = sys.modules.get("gptoughts.engine.distributed.rendezvous")
    return rendezvous.current() if rendezvous else None


def _prints(message: str) -> bool:
    """Return whether this process prints an error: among ranks the first that finds it, so that one cause is one message."""
    meeting = _meeting()
    if meeting is not None:
        return bool(meeting.claim(message))
    from gptoughts.hardware.world import shares_errors

    return not shares_errors(os.environ)


def _exit(message: str, code: int) -> None:
    if message:
        print_line(message, sys.stderr)
    sys.exit(code)
