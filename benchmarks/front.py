"""Command line parts that the benchmarks share: error printing, the output file, the command as it was typed."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from gptoughts.diagnostics.bench.figures import keep, refuse_unwritable
from gptoughts.errors import ConfigError, GptoughtsError
from gptoughts.planning.environment import Process


def run(command: click.Command, module: str, arguments: list[str] | None) -> None:
    """Run a click command as `python -m MODULE`. Without `arguments` the process may be restarted with the plan's variables."""
    process = Process.OURS if arguments is None else Process.CALLERS
    try:
        command.main(args=arguments, prog_name=f"python -m {module}", standalone_mode=False, obj=process)
    except click.ClickException as error:
        _exit(f"{ConfigError.__name__}: {error.format_message()}", error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _exit("interrupted", 130)
    except GptoughtsError as error:
        _exit(f"{type(error).__name__}: {error}", error.exit_code)


def _exit(message: str, code: int) -> None:
    progress(message)
    sys.exit(code)


def typed(module: str) -> str:
    """Return the command line of this process."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def target(out: str | None) -> Path | None:
    """Return the output file. Raises ConfigError if it cannot hold measurements; called before measuring."""
    if out is not None:
        refuse_unwritable(Path(out))
    return Path(out) if out is not None else None


def write(path: Path | None, run: dict[str, Any], key: tuple[str, ...]) -> None:
    """Write `run` to the file if there is one, replacing the run with the same values under `key`."""
    if path is not None:
        keep(path, run, key)
        print(f"written: {path}", flush=True)


def progress(text: str) -> None:
    """Print a line to standard error."""
    print(text, file=sys.stderr, flush=True)
